"""Records models as graphs and answers questions about graphs: shapes, dependencies, blocks, MACs.

Uses `papr_fx.errors` and the window arithmetic of `papr_fx.ops`.
It must not know what a pass, a plan or a proposal is.
"""
