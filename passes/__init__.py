"""The graph rewrites, one a module: what a pass matches is in its `find_site`, what it does in its `rewrite`."""
