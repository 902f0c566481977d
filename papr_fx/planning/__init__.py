"""Decides what is pruned: which graph, which sites, which modules to trace through. Builds the module that is returned.

A `Plan` holds all decisions, so that another keep ratio is one more rewrite of the same dense graph.
It must not know how a rewrite is proved, shown or timed.
"""
