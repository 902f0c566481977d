"""Drops the r tokens of each block that the class token attends to least, after ATS (Fayyaz et al., ECCV 2022).

Before, at each site of `reduce_tokens`:
    mixed  = scaled_dot_product_attention(queries, keys, values)
    tokens = stream + project(mixed)                                          # (B, N, C)

Becomes:
    papr_attended_1 = most_attended(queries, keys, values, r, prefix, scale)  # (B, N - r)
    papr_tokens_1   = gather_tokens(tokens, papr_attended_1)                  # (B, N - r, C)

Because: the class token collects the output, so a token matters by its attention weight times the norm of its value. ATS
samples a number of tokens that depends on the image. Here shapes are static and nothing is trained, so the N - r best stay, as
in EViT (Liang et al., ICLR 2022), but without its token that stands for all dropped ones.

Left alone:
    1. A model without a class token.
    2. What `reduce_tokens` leaves alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..errors import NoSiteError
from ..ops.positions import gather_tokens
from ..ops.reduction import most_attended
from .reduction import Attended, Blocks, Reduction, State


@dataclass(frozen=True)
class AttentionPruning(Reduction):
    """Pruning by the class token's attention, a peer of `Merge`, for `transform(..., merge=...)`.

    Attributes:
        r: Number of tokens dropped in each block, or a list with one for each of these blocks; half of the patches at most.
        blocks: Which blocks: "second-half", "all", or their numbers.
        proportional: No effect, as every token stands for itself.
        schedule: "constant", "late" or "share", see `Reduction`.
    """

    blocks: Blocks = "all"

    def insert(self, at: Attended, state: State) -> tuple[fx.Node, State]:
        """Inserts the nodes of one block."""
        if not at.prefix:
            raise NoSiteError("merge: AttentionPruning needs the attention of a class token, and this model has none")
        stay = at.create("attended", most_attended, at.queries, at.keys, at.values, at.r, at.prefix, at.scale, *at.ends[1:])
        return at.create("tokens", gather_tokens, at.tokens, stay), State(None, None)
