"""Measures models on data and on the clock: readers, accuracy counts, timing, benchmarks, the survey of libraries.

Calls `papr_fx.transform` as a user would.
It must not know command-line options, nor look inside a graph.
"""
