"""Drops tokens in early blocks and merges them in later ones, after Token Fusion (Kim et al., WACV 2024, arXiv 2312.01026).

Before, at each site of `reduce_tokens`:
    mixed  = scaled_dot_product_attention(queries, keys, values)
    tokens = stream + project(mixed)                                   # (B, N, C)

Becomes, in early blocks:
    papr_match_1  = match_tokens(keys, r, prefix)
    papr_stay_1   = papr_match_1[0]
    papr_tokens_1 = gather_tokens(tokens, papr_stay_1)                 # (B, N - r, C)

Becomes, in later blocks:
    papr_match_7  = match_tokens(keys, r, prefix)
    papr_fuse_7   = fuse_tokens(tokens, papr_sizes_6, papr_match_7)    # merged tokens get the norm of their longest member
    papr_tokens_7 = papr_fuse_7[0]                                     # (B, N - r, C)
    papr_sizes_7  = papr_fuse_7[1]                                     # (B, N - r)

Because: early blocks are far from linear in their tokens, so an average of two tokens is a poor stand-in, and one of the two is
kept unchanged. Later blocks are closer to linear, but an average has a smaller norm than the tokens it averages.

Left alone: what `reduce_tokens` leaves alone.

Tokens are matched as in `merge_tokens`. The paper measures from which block on a model is close to linear; here the user says
so, by `linear_from`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import fx

from ..errors import ArgumentError
from ..ops.positions import gather_tokens
from ..ops.reduction import fuse_tokens, match_tokens
from .reduction import Attended, Blocks, Reduction, State


@dataclass(frozen=True)
class TokenFusion(Reduction):
    """Token fusion, a peer of `Merge`, for `transform(..., merge=...)`.

    Attributes:
        r: Number of tokens dropped or merged in each block, or a list with one for each of these blocks; half of the patches
            at most.
        blocks: Which blocks: "second-half", "all", or their numbers.
        proportional: Whether attention weights each token by the number of patches it stands for.
        schedule: "constant", "late" or "share", see `Reduction`.
        linear_from: Number of these blocks, from the first, that drop tokens; the others merge them.
    """

    blocks: Blocks = "all"
    linear_from: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(cast(Any, self.linear_from), int):
            raise ArgumentError(
                f"merge: linear_from (number of blocks that drop tokens) must be a whole number, not {self.linear_from!r}"
            )

    def insert(self, at: Attended, state: State) -> tuple[fx.Node, State]:
        """Inserts the nodes of one block."""
        match = at.create("match", match_tokens, at.keys, at.r, *at.ends)
        if at.number < self.linear_from:
            (stay,) = at.parts(match, "stay")
            return at.create("tokens", gather_tokens, at.tokens, stay), State(None, None)
        fused = at.create("fuse", fuse_tokens, at.tokens, state.sizes, match)
        tokens, sizes = at.parts(fused, "tokens", "sizes")
        return tokens, State(sizes, None)
