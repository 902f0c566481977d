"""What a person reads about a rewrite: the graph diff, and the report of sites and MACs.

Both are derived from a finished module and its plan.
It must not decide anything about a rewrite.
"""
