"""Puts the kept tokens back in their places where code after the blocks lays the patches out as their grid.

Before:
    tokens = blocks.11(...)[:, 1:]                             # (B, n, C), one token per patch
    maps   = tokens.reshape(B, h, w, C)                        # for a convolution, or returned

Becomes:
    papr_patches    = kept_patches(papr_keep, 1)               # (B, k), chosen before the first block
    papr_places     = map_places(papr_patches, (h, w))         # (B, n): the token of each place, -1 where it was dropped
    papr_filled     = fill_nearest(papr_places, (h, w))        # (B, n): the nearest one there
    tokens          = blocks.11(...)[:, 1:]                    # (B, k, C)
    papr_restored_0 = restore_places(tokens, papr_filled, 1)   # (B, n, C)
    maps            = papr_restored_0.reshape(B, h, w, C)

Because: a decoder reads its neighbours at fixed places, and a grid of features that is returned is read by place. So each kept
token goes where its patch was. A dropped place takes the nearest kept token: in maps of a ViT neighbours are alike. With
`restore="zero"` it is zero. It costs one gather per layout, and the filled places once.

Left alone:
    1. Grids that are only pooled: there the kept patches are enough, see `gather_positions`.
    2. Tokens that are returned as a sequence (B, N, C): the kept ones are returned.
    3. A layout inside a block, or one that leads to blocks again (`NoSiteError`).
    4. A reduction of tokens: a merged token has no place (`NoSiteError`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ..dataflow.layouts import set_grid
from ..dataflow.repairs import PlaceSite
from ..ops import TokenRows, fill_nearest, map_places, restore_places, token_places
from ..tracing.checkpoints import lay_inside, regions_of
from ..tracing.graphs import called, nodes_by_name
from ..tracing.roles import tag
from .kinds import Kind
from .prune_tokens import patches_of
from .splice_proposal import Sizes

# What dropped places hold.
FILLS = ("nearest", "zero")


@dataclass(frozen=True)
class Places:
    """Which token stands for each place.

    Attributes:
        rows: What the tokens of the dense graph stand for.
        grid: Sizes of the grid.
        keep: The kept indices.
        fill: What dropped places hold, one of `FILLS`.
        coarse: Whether coarse tokens are among the kept ones: each stands for the places of its patches.
    """

    rows: TokenRows
    grid: Sizes
    keep: fx.Node
    fill: str
    coarse: bool = False


def rewrite(graph: fx.Graph, sites: tuple[PlaceSite, ...], places: Places) -> None:
    """Inserts the places after the kept indices, and a gather before each layout. Other nodes see the kept tokens by now."""
    if not sites:
        return
    nodes, zero = nodes_by_name(graph), places.fill == "zero"
    index = _index(graph, places)
    restored: dict[tuple[object, ...], fx.Node] = {}
    for site in sites:
        layout, value = nodes[site.layout], nodes[site.layout].all_input_nodes[0]
        key = value, site.axis, regions_of(layout)
        if key not in restored:
            options: dict[str, Any] = {"zero": True} if zero else {}
            options |= {"stacked": site.stacked} if site.stacked > 1 else {}
            with graph.inserting_before(layout):
                name = f"papr_restored_{len(restored)}"
                made = graph.create_node("call_function", restore_places, (value, index, site.axis), options, name=name)
            restored[key] = tag(lay_inside(made, regions_of(layout)), Kind.RESTORED, len(restored))
        layout.replace_input_with(value, restored[key])
        if site.counted and site.place is not None:
            set_grid(layout, site.place, places.grid)
        if called(layout) == "view" and layout.op == "call_method":  # of a gather, whose memory may be in another order
            layout.target = "reshape"


def _index(graph: fx.Graph, places: Places) -> fx.Node:
    """The token of each place of the grid, (B, n)."""
    rows, grid, keep = places.rows, places.grid, places.keep
    patches = patches_of(graph, rows, keep)
    place, ends = (token_places, (rows.suffix,)) if places.coarse else (map_places, ())
    with graph.inserting_after(patches):
        index = tag(graph.create_node("call_function", place, (patches, grid, *ends), name="papr_places"), Kind.PLACES)
    if places.fill == "zero":
        return index
    with graph.inserting_after(index):
        return graph.create_node("call_function", fill_nearest, (index, grid), name="papr_filled")
