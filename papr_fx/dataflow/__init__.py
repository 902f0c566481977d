"""Judges what the nodes of a graph do with positions: keep them apart, mix them, move them, attend to them.

Every verdict comes from running a node, never from its class name.
It must not know which rewrite asks, nor change a graph.
"""
