"""Drops the tokens that the class token attends to least, a few in every block, after ATS (Fayyaz et al., ECCV 2022).

Becomes:
    papr_attended_1 = most_attended(queries, keys, values, r, prefix, scale)  # (B, N - r)
    papr_tokens_1   = gather_tokens(tokens, papr_attended_1)                  # (B, N - r, C)

Because: what the class token attends to, in proportion to the length of its value, is what the output is made of. ATS samples
a number of tokens that depends on the image; without training, and for shapes that do not, the N - r best stay, as in EViT
(Liang et al., ICLR 2022), whose one token for all that were dropped is left out.

Left alone:
    1. A model without a token in front of its patches.
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
        r: Tokens fewer behind each block; at most half of the patches there are.
        blocks: In which blocks: "second-half", "all", or their numbers.
        proportional: Of no effect: every token stands for itself.
    """

    blocks: Blocks = "all"

    def insert(self, at: Attended, state: State) -> tuple[fx.Node, State]:
        """Inserts the nodes of one block."""
        if not at.prefix:
            raise NoSiteError("merge: AttentionPruning goes by the attention of a class token, and this model has none")
        stay = at.create("attended", most_attended, at.queries, at.keys, at.values, self.r, at.prefix, at.scale)
        return at.create("tokens", gather_tokens, at.tokens, stay), State(None, None)
