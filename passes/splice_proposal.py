"""Puts the proposal network into the graph, and the choice of positions that follows from its map.

Before:
    x = images                                      # (B, C, H, W)
    tokens = ...                                    # a value whose positions form `grid`

Becomes:
    x          = images
    papr_map   = papr_proposal(x)                   # (B, h', w')
    papr_psm   = resize_map(papr_map, grid)         # (B, h, w)
    papr_keep  = top_positions(papr_psm, z, prefix) # (B, prefix + k)

Because: the map depends on the images alone (PaPr, Sec. 3.1), so it is had before any block runs, and one choice serves
every use of the grid.

Left alone:
    1. A graph with no image placeholder, or with several (`NoSiteError`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..errors import NoSiteError
from ..ops.positions import resize_map, top_positions

PROPOSAL = "papr_proposal"


@dataclass(frozen=True)
class Site:
    """Where the images enter."""

    images: fx.Node


def find_site(graph: fx.Graph) -> Site:
    """Finds the image placeholder of a traced model."""
    found = graph.find_nodes(op="placeholder")
    if len(found) != 1:
        raise NoSiteError(
            f"the graph takes {len(found)} inputs ({', '.join(n.name for n in found)}); one image batch is needed"
        )
    return Site(found[0])


def rewrite(
    graph: fx.Graph, site: Site, before: fx.Node, grid: tuple[int | fx.Node, ...], z: float, *, prefix: int = 0, name: str = ""
) -> fx.Node:
    """Inserts proposal, map and choice in front of node `before`.

    Args:
        graph: The graph to change.
        site: The image placeholder.
        before: The first node that may use the choice.
        grid: Rows and columns, each a number or a node that yields one.
        z: Keep ratio in (0, 1).
        prefix: Tokens in front of the grid, always kept.
        name: The grid's name, where a model has several; the map itself is had once.

    Returns:
        The `papr_keep` node, (B, prefix + k) indices.
    """
    suffix = f"_{name}" if name else ""
    (significance,) = graph.find_nodes(op="call_module", target=PROPOSAL) or (None,)
    with graph.inserting_before(before):
        if significance is None:
            significance = graph.create_node("call_module", PROPOSAL, (site.images,), name="papr_map")
        psm = graph.create_node("call_function", resize_map, (significance, grid), name=f"papr_psm{suffix}")
        return graph.create_node("call_function", top_positions, (psm, z, prefix), name=f"papr_keep{suffix}")
