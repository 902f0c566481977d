"""Proves a rewrite on the model itself. Each file checks one kind of fault; `prove` runs them in order.

Parameters are redrawn at unit scale first, so that no fault hides behind a small weight.
It must not change a plan or a graph that it is given, and must not know the command line.
"""
