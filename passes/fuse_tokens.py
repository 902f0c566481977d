"""Drops tokens in early blocks and merges them in later ones, after Token Fusion (Kim et al., WACV 2024, arXiv 2312.01026).

Becomes, in early blocks:
    papr_match_1  = match_tokens(keys, r, prefix)
    papr_stay_1   = papr_match_1[0]
    papr_tokens_1 = gather_tokens(tokens, papr_stay_1)                 # (B, N - r, C)

And in later ones:
    papr_match_7  = match_tokens(keys, r, prefix)
    papr_fuse_7   = fuse_tokens(tokens, papr_sizes_6, papr_match_7)    # merged tokens keep the norm of the longest member

Because: early blocks answer an average of tokens by something else than the average of their answers, so there one of two
like tokens stays as it is; later ones are closer to linear, but an average is shorter than what it averages.

Left alone: what `reduce_tokens` leaves alone.

Tokens are matched as `merge_tokens` matches them. The paper finds by measurement from which block on a model is close to
linear; here `linear_from` says so.
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
        r: Tokens fewer behind each block; at most half of the patches there are.
        blocks: In which blocks: "second-half", "all", or their numbers.
        proportional: Whether attention weighs merged tokens by their size.
        linear_from: In how many of these blocks, from the first, tokens are dropped; in the rest they are merged.
    """

    blocks: Blocks = "all"
    linear_from: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(cast(Any, self.linear_from), int):
            raise ArgumentError(
                f"merge: linear_from (blocks in which tokens are dropped) must be a number, not {self.linear_from!r}"
            )

    def insert(self, at: Attended, state: State) -> tuple[fx.Node, State]:
        """Inserts the nodes of one block."""
        match = at.create("match", match_tokens, at.keys, self.r, at.prefix)
        if at.number < self.linear_from:
            (stay,) = at.parts(match, "stay")
            return at.create("tokens", gather_tokens, at.tokens, stay), State(None, None)
        fused = at.create("fuse", fuse_tokens, at.tokens, state.sizes, match)
        tokens, sizes = at.parts(fused, "tokens", "sizes")
        return tokens, State(sizes, None)
