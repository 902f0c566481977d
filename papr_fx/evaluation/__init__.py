"""Measures models: accuracy on data, speed, and which architectures of a library can be pruned.

It calls `papr_fx.transform` as a user would.
It must not know command-line options, nor change a graph.
"""
