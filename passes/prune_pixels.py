"""Runs the pixel operators of a hierarchical model on the significant positions only.

Before:
    conv   = conv_dw(x)                                      # (B, C, h, w): the spatial operator, which stays dense
    pixels = mlp(norm(conv))
    add    = x + pixels

Becomes:
    conv      = conv_dw(x)
    papr_keep_hxw  = ...                                              # (B, k), see splice_proposal; one per grid
    papr_index_hxw = pixel_rows(papr_keep_hxw, (h, w))                # (B * k,)
    papr_pixels_0  = gather_pixels(conv, papr_index_hxw, (h, w), "BCHW")     # (B, C, k, 1)
    pixels         = mlp(norm(papr_pixels_0))
    papr_out_0     = write_pixels(x, pixels, papr_index_hxw, "BCHW", "zero") # (B, C, h, w)

Because: a pixel operator treats every position independently, so its cost falls with k, and its results for kept positions
stay the same (PaPr, Eq. 4). At dropped positions the branch is zero. The residual stays there with background "keep", and is
zeroed too with "zero" ("auto": see `background_of`). One choice of positions, and its index arithmetic, serves all sites of a
grid.

Left alone:
    1. A branch without a Linear or 1x1 convolution.
    2. A branch that starts neither at the residual's source nor at a depthwise convolution.
    3. A branch with an operation that mixes positions or depends on the grid's size (see `papr_fx.dataflow.positionwise`).
    4. Positions in one axis that cannot be traced back to rows and columns.
    5. A branch that holds another operator, as where a long skip connection spans whole blocks.

Tokens before the positions and behind them are always kept, as in a token model. Where values were moved into windows
(MaxViT), the nodes that moved them are copied onto the numbers of the cells. So the kept positions are known in the order of
the windows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import cast

import torch
from torch import fx, nn

from ..dataflow.branches import Branch, BranchReader, Layouts
from ..dataflow.grids import grid_of, image_rank
from ..dataflow.moves import find_moves, operands
from ..dataflow.positionwise import Layout, PositionwiseProbe
from ..ops import TokenRows, gather_pixels, write_pixels
from ..tracing.checkpoints import lay_inside, regions_of
from ..tracing.graphs import descendants, nodes_by_name, shape_of
from ..tracing.roles import tag
from . import splice_proposal
from .index_pixels import Index, PixelIndexer, Placing
from .kinds import Kind


@dataclass(frozen=True)
class PixelSite:
    """A residual addition and the pixel operator that feeds it. Nodes are stored by name, so that it holds for graph copies.

    Attributes:
        name: What the operator's last pointwise layer calls.
        addition: The residual addition.
        residual: Its operand that bypasses the operator.
        branch: Its other operand, the last node of the operator.
        region: The operator's nodes, in order.
        entries: The values that enter it, and their layouts.
        layout: Layout of residual, branch and addition.
        placing: Where its positions come from.
        masked: Nodes of the region that treat dropped positions as zeros, and their layouts.
        convolution: Whether a depthwise convolution feeds the operator.
    """

    name: str
    addition: str
    residual: str
    branch: str
    region: tuple[str, ...]
    entries: tuple[tuple[str, Layout], ...]
    layout: Layout
    placing: Placing
    masked: tuple[tuple[str, Layout], ...]
    convolution: bool

    @property
    def rows(self) -> TokenRows:
        """The grid of its positions, and the tokens before and behind it."""
        return self.placing.rows

    def with_rows(self, rows: TokenRows) -> PixelSite:
        """The same site, whose positions are those rows."""
        return replace(self, placing=replace(self.placing, rows=rows))

    @property
    def ordered(self) -> tuple[str, Layout]:
        """A value whose positions are in the order of the image, after the prefix, and its axes."""
        moves = self.placing.moves
        return (moves.origin, moves.layout) if moves else (self.residual, self.layout)


@dataclass(frozen=True)
class Skipped:
    """A residual addition that stays dense, and why."""

    addition: str
    reason: str


@dataclass(frozen=True)
class PixelChoice:
    """What holds for all sites of a rewrite.

    Attributes:
        z: Keep ratio in (0, 1).
        background: "keep", "zero" or "auto", see `background_of`.
        layout: Axes of the images or clips.
        training: Whether the graph is for training mode.
        dynamic: Whether grids are read at run time.
        fine: Whether the map is as fine as the clips.
    """

    z: float
    background: str
    layout: str = "BCHW"
    training: bool = False
    dynamic: bool = False
    fine: bool = False


def find_sites(graph: fx.Graph, root: nn.Module, probe: PositionwiseProbe) -> tuple[tuple[PixelSite, ...], tuple[Skipped, ...]]:
    """Finds every residual branch that can run on some positions, and says why others cannot.

    Args:
        graph: A traced graph whose nodes carry `shape` and `joins` in `meta`.
        root: The modules that it calls.
        probe: Runs nodes on numbers.
    """
    sites: list[PixelSite] = []
    skipped: list[Skipped] = []
    reader = BranchReader(root, frozenset(descendants(*graph.find_nodes(op="placeholder"))), probe)
    for addition in graph.nodes:
        pair = operands(addition)
        orders = (pair[::-1], pair) if pair else ()  # either operand may be the branch
        pruned = {site.addition for site in sites}
        found = [_match(reader, reader.branch(addition, *order), pruned) for order in orders]
        chosen = next((site for site in found if isinstance(site, PixelSite)), None)
        if chosen:
            sites.append(chosen)
        else:
            skipped.extend(Skipped(addition.name, reason) for reason in found[::-1] if isinstance(reason, str))
    return tuple(sites), tuple(skipped)


def rewrite(graph: fx.Graph, sites: Sequence[PixelSite], choice: PixelChoice) -> None:
    """Inserts the proposal, one choice of positions per grid, and a gather and a write-back per site.

    Args:
        graph: The graph to change. It holds the sites.
        sites: From `find_sites` on this graph or a copy of it.
        choice: What holds for all sites.
    """
    nodes = nodes_by_name(graph)
    images = splice_proposal.find_site(graph, fine=choice.fine)
    indexer = PixelIndexer(graph, nodes, images, choice.z, dynamic=choice.dynamic)
    indices = indexer.indices([site.placing for site in sites])
    for number, (site, index) in enumerate(zip(sites, indices, strict=True)):
        _rewrite_site(nodes, site, number, index, background_of(site, choice.background, choice.training))
    packed = {"BCHW": torch.channels_last, "BCTHW": torch.channels_last_3d}
    if choice.layout in packed and any(site.layout == choice.layout for site in sites):
        _lay_channels_last(graph, images.images, packed[choice.layout])


def background_of(site: PixelSite, background: str, training: bool) -> str:
    """What dropped positions of `site` hold afterwards: "keep" or "zero".

    "auto" zeroes them after a depthwise convolution, and keeps them elsewhere and in training, as the authors' release does.
    """
    if background != "auto":
        return background
    return "zero" if site.convolution and not training else "keep"


def _match(reader: BranchReader, branch: Branch, pruned: Collection[str]) -> PixelSite | str | None:
    """The site of a branch; or why it is not one; or None where there is no pointwise layer to prune.

    The additions in `pruned` are those of other sites.
    """
    layers = reader.pointwise_layers(branch)
    if not layers:
        return None
    layer = f"`{layers[-1].target}`"
    inner = next((node for node in branch.region if node.name in pruned), None)
    if inner is not None:
        return f"{layer}: its branch holds the residual addition `{inner}`, whose own branch is pruned"
    foreign = reader.foreign_entries(branch)
    if foreign or not branch.entries:
        start = foreign[0] if foreign else None
        return f"{layer}: its branch starts at `{start}`, neither the residual's source nor a depthwise convolution"
    found = reader.find_layouts(branch)
    if isinstance(found, str):
        return f"{layer}: {found}"
    source, layout = branch.sources[-1], found.layouts[branch.end]
    moves = find_moves(source, layout, reader.root) if len(layout) == 4 else None
    grid = grid_of(nodes_by_name(source.graph)[moves.origin], moves.layout) if moves else grid_of(source, layout)
    if grid is None:
        return f"{layer}: the positions of `{source}` {shape_of(source)} cannot be traced back to rows and columns"
    rows, origin = grid
    rank = image_rank(source.graph)
    if len(rows.grid) != rank:
        return f"{layer}: its positions have {len(rows.grid)} axes, those of the input {rank}"
    if any(_count(node, axes) != rows.count for node, axes in found.layouts.items() if shape_of(node)):
        return f"{layer}: its positions are not those of grid {rows.grid}"
    placing = Placing(source.name, branch.region[0].name, rows, origin, moves)
    return _site(branch, found, str(layers[-1].target), placing)


def _site(branch: Branch, found: Layouts, name: str, placing: Placing) -> PixelSite:
    return PixelSite(
        name=name,
        addition=branch.addition.name,
        residual=branch.residual.name,
        branch=branch.end.name,
        region=tuple(node.name for node in branch.region),
        entries=tuple((entry.name, found.layouts[entry]) for entry in branch.entries),
        layout=found.layouts[branch.end],
        placing=placing,
        masked=tuple((node.name, found.layouts[node]) for node in branch.region if node in found.masked),
        convolution=bool(branch.convolutions),
    )


def _count(node: fx.Node, layout: Layout) -> int:
    """Number of positions, other tokens included."""
    return prod(size for size, letter in zip(cast("tuple[int, ...]", shape_of(node)), layout, strict=True) if letter in "THWN")


def _rewrite_site(nodes: dict[str, fx.Node], site: PixelSite, number: int, index: Index, background: str) -> None:
    """Gathers what enters an operator, and writes its result back."""
    region = [nodes[name] for name in site.region]
    graph = region[0].graph
    with graph.inserting_before(region[0]):
        for place, (name, layout) in enumerate(site.entries):
            arguments = (nodes[name], index.rows, index.sizes, layout)
            own = f"papr_pixels_{number}" + (f"_{place}" if place else "")
            gathered = graph.create_node("call_function", gather_pixels, arguments, name=own)
            for node in region:
                node.replace_input_with(nodes[name], gathered)
    addition = nodes[site.addition]
    operands = (nodes[site.residual], nodes[site.branch], index.rows, site.layout, background)
    with graph.inserting_before(addition):
        written = graph.create_node("call_function", write_pixels, operands, name=f"papr_out_{number}")
    tag(lay_inside(written, regions_of(addition)), Kind.WRITTEN, number)
    addition.replace_all_uses_with(written)
    graph.erase_node(addition)
    nodes[site.addition] = written  # later sites know the sum by its name


def _lay_channels_last(graph: fx.Graph, images: fx.Node, memory_format: torch.memory_format) -> None:
    """Converts the images once: only in channels-last memory are positions rows, which a gather copies quickly."""
    options = {"memory_format": memory_format}
    with graph.inserting_after(images):
        packed = graph.create_node("call_method", "contiguous", (images,), options, name="papr_channels_last")
    tag(packed, Kind.CHANNELS_LAST)
    images.replace_all_uses_with(packed, delete_user_cb=lambda user: user is not packed)
