"""Merges the tokens that are most alike, a few in every block (Bolya et al., ICLR 2023): bipartite soft matching.

Before, at each site of `reduce_tokens`:
    mixed  = scaled_dot_product_attention(queries, keys, values)
    tokens = stream + project(mixed)                              # (B, N, C)

Becomes:
    tokens        = stream + project(mixed)
    papr_match_1  = match_tokens(keys, r, prefix)
    papr_merge_1  = merge_tokens(tokens, papr_sizes_0, papr_match_1)
    papr_tokens_1 = papr_merge_1[0]                               # (B, N - r, C)
    papr_sizes_1  = papr_merge_1[1]                               # (B, N - r)

Because: keys say what a token holds, so tokens of like keys hold nearly the same, and one that weighs as much stands for both
(PaPr, Sec. 4.1, merges in the second half of the blocks, behind its own pruning). r is fixed, so shapes are.

Left alone: what `reduce_tokens` leaves alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..ops.reduction import match_tokens, merge_tokens
from ..tracing.roles import Kind, tag
from .reduction import Attended, Reduction, State


@dataclass(frozen=True)
class Merge(Reduction):
    """Token merging, for `transform(..., merge=...)`.

    Attributes:
        r: Tokens merged in each block; at most half of the patches there are.
        blocks: In which blocks: "second-half", "all", or their numbers.
        proportional: Whether attention weighs tokens by the patches that they stand for: yes for models trained with labels,
            no for MAE (PaPr, Sec. 4.1). Averages over tokens are weighted in any case.

    Raises:
        ArgumentError: A value is out of range.
    """

    def insert(self, at: Attended, state: State) -> tuple[fx.Node, State]:
        """Inserts the nodes of one block."""
        match = tag(at.create("match", match_tokens, at.keys, self.r, at.prefix), Kind.MATCH, at.number)
        merged = at.create("merge", merge_tokens, at.tokens, state.sizes, match)
        tokens, sizes = at.parts(merged, "tokens", "sizes")
        return tokens, State(sizes, None)
