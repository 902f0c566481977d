"""The graph rewrites, one a file: a docstring with the graph before and after, a site, `find_site` or `find_sites`, `rewrite`.

`reduction`, `index_pixels` and `kinds` hold what several passes share; merge, fuse, attend and propagate are reductions.
A pass must not know which model is pruned, which module is returned, or how a rewrite is proved.
"""
