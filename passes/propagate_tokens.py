"""Drops tokens and hands what they hold to their neighbours, after GTP-ViT (Xu et al., WACV 2024, arXiv 2311.03035).

Becomes:
    papr_chosen_1    = choose_tokens(queries, keys, papr_sizes_0, r, prefix, scale)     # (stay, drop)
    papr_propagate_1 = propagate_tokens(tokens, keys, papr_sizes_0, papr_chosen_1, papr_places_0, grid, ...)
    papr_tokens_1    = papr_propagate_1[0]                                              # (B, N - r, C)
    papr_sizes_1     = papr_propagate_1[1]                                              # (B, N - r)
    papr_places_1    = papr_propagate_1[2]                                              # (B, N - r)

Because: a token that attends to itself cannot be had from others, and one that others attend to is needed by them; the product
of both says which stay. Those that go add a share of themselves to the tokens beside them in the image and to those of like
keys, over a graph whose edges are normalised by degree: X_stay + strength * A_hat X_drop.

Left alone: what `reduce_tokens` leaves alone.

The paper's sparse attention is left out: a fused attention has no use for it. It builds the graph of like tokens once, from
the embedding; here it is that of each block's keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import fx

from ..errors import ArgumentError
from ..ops.reduction import choose_tokens, propagate_tokens
from .reduction import Attended, Blocks, Reduction, State


@dataclass(frozen=True)
class TokenPropagation(Reduction):
    """Graph-based token propagation, a peer of `Merge`, for `transform(..., merge=...)`.

    Attributes:
        r: Tokens fewer behind each block; at most half of the patches there are.
        blocks: In which blocks: "second-half", "all", or their numbers.
        proportional: Whether attention weighs tokens by what they took up.
        strength: Share of a dropped token that is handed on.
        edges: Tokens of like keys that each dropped one is connected to.

    Raises:
        ArgumentError: A value is out of range.
    """

    blocks: Blocks = "all"
    strength: float = 0.2
    edges: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.strength < float("inf") or not isinstance(cast(Any, self.edges), int) or self.edges < 1:
            raise ArgumentError("merge: strength must be a number from 0 on, and edges a whole number from 1 on")

    def insert(self, at: Attended, state: State) -> tuple[fx.Node, State]:
        """Inserts the nodes of one block."""
        chosen = at.create("chosen", choose_tokens, at.queries, at.keys, state.sizes, self.r, at.prefix, at.scale)
        arguments = at.tokens, at.keys, state.sizes, chosen, state.places, at.grid, at.prefix, self.strength, self.edges
        propagated = at.create("propagate", propagate_tokens, *arguments)
        tokens, sizes, places = at.parts(propagated, "tokens", "sizes", "places")
        return tokens, State(sizes, places)
