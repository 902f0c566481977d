"""Judges what the nodes of a graph do with positions: keep them apart, mix them, move them, attend to them.

Verdicts come from what a node does, mostly by running it, never from the class names of a library.
It must not know which rewrite asks.
"""
