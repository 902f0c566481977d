"""Merges the r most similar tokens of each block, by bipartite soft matching (Bolya et al., ICLR 2023).

Before, at each site of `reduce_tokens`:
    mixed  = scaled_dot_product_attention(queries, keys, values)
    tokens = stream + project(mixed)                              # (B, N, C)

Becomes:
    tokens        = stream + project(mixed)
    papr_match_1  = match_tokens(keys, r, prefix)
    papr_merge_1  = merge_tokens(tokens, papr_sizes_0, papr_match_1)
    papr_tokens_1 = papr_merge_1[0]                               # (B, N - r, C)
    papr_sizes_1  = papr_merge_1[1]                               # (B, N - r)

Because: keys summarise what a token holds, so tokens with like keys hold nearly the same, and their average, weighted by size,
stands for both. r is fixed, so shapes are static. PaPr, Sec. 4.1, merges in the second half of the blocks, after pruning.

Left alone: what `reduce_tokens` leaves alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..ops.reduction import match_tokens, merge_tokens
from ..tracing.roles import tag
from .kinds import Kind
from .reduction import Attended, Reduction, State


@dataclass(frozen=True)
class Merge(Reduction):
    """Token merging, for `transform(..., merge=...)`.

    Attributes:
        r: Number of tokens merged in each block, or a list with one for each of these blocks; half of the patches at most.
        blocks: Which blocks: "second-half", "all", or their numbers.
        proportional: Whether attention weights each token by the number of patches it stands for: True for models trained with
            labels, False for MAE (PaPr, Sec. 4.1). Averages over tokens are always weighted.
        schedule: "constant", r in each block; or for the same multiply-accumulates "late", more in late blocks than in early
            ones, or "share", the same share of the patches in each block.

    Raises:
        ArgumentError: A value is out of range.
    """

    def insert(self, at: Attended, state: State) -> tuple[fx.Node, State]:
        """Inserts the nodes of one block."""
        match = tag(at.create("match", match_tokens, at.keys, at.r, *at.ends), Kind.MATCH, at.number)
        merged = at.create("merge", merge_tokens, at.tokens, state.sizes, match)
        tokens, sizes = at.parts(merged, "tokens", "sizes")
        return tokens, State(sizes, None)
