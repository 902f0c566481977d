"""Puts the proposal network into the graph, and the choice of positions that follows from its map.

Before:
    x = images                                      # (B, C, H, W)
    tokens = ...                                    # a value whose positions form `grid`

Becomes:
    x          = images
    papr_map   = papr_proposal(x)                   # (B, h', w')
    papr_psm   = resize_map(papr_map, grid)         # (B, h, w)
    papr_keep  = top_positions(papr_psm, z, prefix) # (B, prefix + k)

Because: the map depends only on the images (PaPr, Sec. 3.1), so it is computed before the first block, and one choice serves
every use of the grid.

With a coarse background `choose_quads` chooses, see `coarsen_background`.

A map as fine as the clips, of motion, is averaged over tubelets: `papr_psm = pool_map(papr_map, grid)`.

Left alone:
    1. A graph without an image placeholder, or with several (`NoSiteError`).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from ..errors import NoSiteError
from ..ops import choose_quads, pool_map, resize_map, top_positions
from ..tracing.roles import find_all, tag
from .kinds import Kind

PROPOSAL = "papr_proposal"

# Sizes of a grid: known, or nodes that read them at run time.
Sizes = tuple[int | fx.Node, ...]

_AXES = ("frames", "rows", "columns")


@dataclass(frozen=True)
class ImageSite:
    """Where the images enter.

    Attributes:
        images: Their placeholder.
        fine: Whether their map is as fine as they are, so that it is averaged over the cells of a grid.
    """

    images: fx.Node
    fine: bool = False


@dataclass(frozen=True)
class Selection:
    """One choice of positions.

    Attributes:
        grid: Sizes of the grid.
        z: Keep ratio in (0, 1).
        prefix: Tokens before the grid, always kept.
        behind: Tokens behind the grid, always kept.
        number: Which choice of the graph it is.
        suffix: Ends the names of its nodes.
        coarse: Whether patches that are not kept become coarse tokens.
    """

    grid: Sizes
    z: float
    prefix: int = 0
    behind: int = 0
    number: int = 0
    suffix: str = ""
    coarse: bool = False


def find_site(graph: fx.Graph, *, fine: bool = False) -> ImageSite:
    """Finds the image placeholder of a traced model; `fine` says what map its images will have.

    Raises:
        NoSiteError: There is none, or several.
    """
    found = graph.find_nodes(op="placeholder")
    if len(found) != 1:
        raise NoSiteError(
            f"the graph takes {len(found)} inputs ({', '.join(n.name for n in found)}); one image batch is needed"
        )
    return ImageSite(found[0], fine)


def rewrite(graph: fx.Graph, site: ImageSite, before: fx.Node, selection: Selection) -> fx.Node:
    """Inserts map and choice before node `before`, and the proposal if the graph has none yet.

    Returns:
        The node of the kept indices, (B, prefix + k), or (B, prefix + k + behind).
    """
    grid, z, suffix = selection.grid, selection.z, selection.suffix
    (significance,) = find_all(graph, Kind.MAP) or (None,)
    with graph.inserting_before(before):
        if significance is None:
            significance = tag(graph.create_node("call_module", PROPOSAL, (site.images,), name="papr_map"), Kind.MAP)
        resize = pool_map if site.fine else resize_map
        psm = graph.create_node("call_function", resize, (significance, grid), name=f"papr_psm{suffix}")
        chosen = (psm, z, selection.prefix, *([selection.behind] if selection.behind else []))
        choose = choose_quads if selection.coarse else top_positions
        keep = graph.create_node("call_function", choose, chosen, name=f"papr_keep{suffix}")
    tag(psm, Kind.PSM, selection.number)
    return tag(keep, Kind.KEEP, selection.number)


def read_sizes(graph: fx.Graph, source: fx.Node, axes: tuple[int, ...], suffix: str = "") -> tuple[fx.Node, ...]:
    """Inserts nodes that read the sizes of a grid from `axes` of `source`, at the graph's insertion point."""
    shape = graph.create_node("call_function", getattr, (source, "shape"), name=f"papr_shape{suffix}")
    return tuple(
        graph.create_node("call_function", operator.getitem, (shape, axis), name=f"papr_{word}{suffix}")
        for axis, word in zip(axes, _AXES[-len(axes) :], strict=True)
    )
