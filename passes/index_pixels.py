"""Chooses positions once per grid, and computes the rows that the sites of `prune_pixels` gather.

Becomes, before the first site of a grid:
    papr_keep_hxw  = ...                                    # (B, k), see splice_proposal
    papr_index_hxw = pixel_rows(papr_keep_hxw, (h, w))      # (B * k,)

With positions in windows:
    papr_cells_hxw = number_cells(papr_keep_hxw, (h, w), "BHWC")       # (1, h, w, 1)
    ...                                                     # the nodes that move values, copied onto the cells
    papr_moved_hxw = moved_cells(papr_keep_hxw, ...)        # (B, k): the kept positions, in the order of the windows

Because: sites of one grid keep the same positions (PaPr, Sec. 3.3). Sites whose values are in the same order share the rows.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import fx

from ..dataflow.grids import Origin
from ..dataflow.moves import Moves, copy_moves
from ..ops import TokenRows, moved_cells, number_cells, pixel_rows, with_prefix, with_suffix
from . import splice_proposal
from .splice_proposal import ImageSite, Selection, Sizes


@dataclass(frozen=True)
class Placing:
    """Where the positions of a pixel operator come from. Nodes are stored by name, so that it holds for copies of the graph.

    Attributes:
        source: The value whose copy or scaled form is the residual.
        start: The first node of the operator.
        rows: The grid, and the tokens before and behind it where positions have one axis.
        origin: Where the sizes of the grid can be read at run time.
        moves: How the positions left the order of the image, if they did: into windows.
    """

    source: str
    start: str
    rows: TokenRows
    origin: Origin
    moves: Moves | None = None


class Index(NamedTuple):
    """Kept positions as rows of a value.

    Attributes:
        rows: The node of the flat rows, (B * k,).
        sizes: Sizes of the value's positions: those of the grid, or their number where they have one axis.
    """

    rows: fx.Node
    sizes: Sizes


class _Chosen(NamedTuple):
    """The kept positions of a grid, (B, k), and its sizes."""

    keep: fx.Node
    grid: Sizes


@dataclass(frozen=True)
class PixelIndexer:
    """Inserts choices and indices into a dense graph.

    Attributes:
        graph: The graph.
        nodes: Its nodes by name.
        images: Where the images enter.
        z: Keep ratio in (0, 1).
        dynamic: Whether grids are read at run time.
    """

    graph: fx.Graph
    nodes: dict[str, fx.Node]
    images: ImageSite
    z: float
    dynamic: bool

    def indices(self, sites: Sequence[Placing]) -> list[Index]:
        """The index of each site. Sites share what is equal."""
        first = self.images.images.next
        in_order = sorted(sites, key=lambda site: self.nodes[site.start], reverse=True)
        leads = {site.rows.grid: site for site in in_order}  # the first to run; their additions may come in another order
        chosen: dict[tuple[int, ...], _Chosen] = {}
        indices: dict[tuple[object, ...], Index] = {}
        found: list[Index] = []
        for site in sites:
            grid = site.rows.grid
            if grid not in chosen:
                before = self.nodes[leads[grid].source].next if self.dynamic else first
                chosen[grid] = self._choose(leads[grid], before, len(chosen))
            # At other image sizes, moves may differ that are equal at the traced one.
            order = site.moves and (site.moves.path if self.dynamic else site.moves.cells)
            key = (grid, site.rows.prefix, site.rows.suffix, order)
            if key not in indices:
                orders = sum(other == grid for other, *_ in indices)
                name = grid_name(grid) + (f"_{orders}" if orders else "")
                with self.graph.inserting_before(chosen[grid].keep.next):
                    indices[key] = self._index(site, chosen[grid], name)
            found.append(indices[key])
        return found

    def _choose(self, site: Placing, before: fx.Node, number: int) -> _Chosen:
        """Chooses the positions of the site's grid, before node `before`."""
        grid: Sizes = site.rows.grid
        suffix = f"_{grid_name(site.rows.grid)}"
        if self.dynamic:
            with self.graph.inserting_before(before):
                grid = splice_proposal.read_sizes(self.graph, self.nodes[site.origin.node], site.origin.axes, suffix)
        selection = Selection(grid, self.z, number=number, suffix=suffix)
        return _Chosen(splice_proposal.rewrite(self.graph, self.images, before, selection), grid)

    def _index(self, site: Placing, chosen: _Chosen, name: str) -> Index:
        """The flat rows of kept positions, in the order of the site's values."""
        keep, grid = chosen
        create = self.graph.create_node
        sizes = grid
        if site.moves:
            cells = create("call_function", number_cells, (keep, grid, site.moves.layout), name=f"papr_cells_{name}")
            path = [self.nodes[step] for step in site.moves.path]
            moved = copy_moves(self.graph, self.nodes[site.moves.origin], path, cells)[-1]
            keep = create("call_function", moved_cells, (keep, moved), name=f"papr_moved_{name}")
            sizes = (site.rows.cells if not self.dynamic else self._product(grid, name),)
        if site.rows.others:
            keep, count = self._with_others(keep, site.rows, grid, name)
            grid = sizes = (count,)
        return Index(create("call_function", pixel_rows, (keep, grid), name=f"papr_index_{name}"), sizes)

    def _with_others(self, keep: fx.Node, rows: TokenRows, grid: Sizes, name: str) -> tuple[fx.Node, fx.Node | int]:
        """Kept positions with the tokens in front of the grid and behind it, and the number of all."""
        create = self.graph.create_node
        count: fx.Node | int = rows.prefix + rows.cells
        if self.dynamic:
            count = create("call_function", operator.add, (self._product(grid, name), rows.prefix))
        if rows.prefix:
            keep = create("call_function", with_prefix, (keep, rows.prefix), name=f"papr_all_{name}")
        if rows.suffix:
            keep = create("call_function", with_suffix, (keep, count, rows.suffix), name=f"papr_ends_{name}")
            count = create("call_function", operator.add, (count, rows.suffix)) if self.dynamic else rows.count
        return keep, count

    def _product(self, sizes: Sizes, name: str) -> fx.Node | int:
        """The number of positions of a grid whose sizes are nodes."""
        count = sizes[0]
        for size in sizes[1:]:
            count = self.graph.create_node("call_function", operator.mul, (count, size), name=f"papr_count_{name}")
        return count


def grid_name(grid: tuple[int, ...]) -> str:
    """The grid in the names of nodes, such as 14x14."""
    return "x".join(map(str, grid))
