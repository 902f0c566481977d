"""Drops tokens and passes a share of each on to its neighbours, after GTP-ViT (Xu et al., WACV 2024, arXiv 2311.03035).

Before, at each site of `reduce_tokens`:
    mixed  = scaled_dot_product_attention(queries, keys, values)
    tokens = stream + project(mixed)                                                   # (B, N, C)

Becomes:
    tokens           = stream + project(mixed)
    papr_chosen_1    = choose_tokens(queries, keys, papr_sizes_0, r, prefix, scale)    # (stay, drop)
    papr_graph_1     = neighbour_graph(keys, papr_places_0, grid, prefix, edges)       # (B, N, N)
    papr_propagate_1 = propagate_tokens(tokens, papr_sizes_0, papr_chosen_1, papr_graph_1, strength)
    papr_tokens_1    = papr_propagate_1[0]                                             # (B, N - r, C)
    papr_sizes_1     = papr_propagate_1[1]                                             # (B, N - r)
    papr_stay_1      = papr_chosen_1[0]
    papr_places_1    = papr_places_0.gather(1, papr_stay_1)                            # (B, N - r)

Because: a token that attends to itself is hard to regenerate from others, and a token that others attend to is needed by them.
The tokens with the lowest product of the two are dropped. Each adds a share of itself to the tokens that touch it in the image
and to tokens with like keys, over a graph normalised by degree: X_stay + strength * A_hat X_drop.

Left alone: what `reduce_tokens` leaves alone.

The paper's sparse attention is left out, as fused attention kernels cannot use it. The paper builds the graph of like tokens
once, from the embedding; here each block builds it from its keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import fx

from ..errors import ArgumentError
from ..ops.reduction import choose_tokens, neighbour_graph, propagate_tokens
from .reduction import Attended, Blocks, Reduction, State


@dataclass(frozen=True)
class TokenPropagation(Reduction):
    """Graph-based token propagation, a peer of `Merge`, for `transform(..., merge=...)`.

    Attributes:
        r: Number of tokens dropped in each block, or a list with one for each of these blocks; half of the patches at most.
        blocks: Which blocks: "second-half", "all", or their numbers.
        proportional: Whether attention weights each token by its size, which grows by the shares it receives.
        schedule: "constant", "late" or "share", see `Reduction`.
        strength: Share of a dropped token that is passed on.
        edges: Number of tokens with like keys that each token is connected to.

    Raises:
        ArgumentError: A value is out of range.
    """

    needs_places: ClassVar[bool] = True

    blocks: Blocks = "all"
    strength: float = 0.2
    edges: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.strength < float("inf") or not isinstance(cast(Any, self.edges), int) or self.edges < 1:
            raise ArgumentError("merge: strength must be a number of at least 0, and edges a whole number of at least 1")

    def insert(self, at: Attended, state: State) -> tuple[fx.Node, State]:
        """Inserts the nodes of one block."""
        behind = at.ends[1:]
        chosen = at.create("chosen", choose_tokens, at.queries, at.keys, state.sizes, at.r, at.prefix, at.scale, *behind)
        graph = at.create("graph", neighbour_graph, at.keys, state.places, at.grid, at.prefix, self.edges, *behind)
        propagated = at.create("propagate", propagate_tokens, at.tokens, state.sizes, chosen, graph, self.strength)
        tokens, sizes = at.parts(propagated, "tokens", "sizes")
        (stay,) = at.parts(chosen, "stay")
        places = stay if state.places is None else at.create("places", torch.gather, state.places, 1, stay)
        return tokens, State(sizes, places)
