"""Runs the pixel operators of a hierarchical model on the significant positions only.

Before:
    conv   = conv_dw(x)                                      # (B, C, h, w): the spatial operator, which stays dense
    pixels = mlp(norm(conv))
    add    = x + pixels

Becomes:
    conv      = conv_dw(x)
    papr_keep_hxw  = ...                                              # (B, k), see splice_proposal; one for each grid
    papr_index_hxw = pixel_rows(papr_keep_hxw, (h, w))                # (B * k,)
    papr_pixels_0  = gather_pixels(conv, papr_index_hxw, (h, w), "BCHW")     # (B, C, k, 1)
    pixels         = mlp(norm(papr_pixels_0))
    papr_out_0     = write_pixels(x, pixels, papr_index_hxw, "BCHW", "zero") # (B, C, h, w)

Because: these operators treat every position alone, so their cost falls with k and what they compute for kept positions is
unchanged (PaPr, Eq. 4). Elsewhere the branch is zero; with background "keep" the residual passes there, with "zero" it is
zeroed too. One choice of positions, and its index arithmetic, serves all sites of a grid.

Left alone:
    1. A branch that holds no Linear and no 1x1 convolution.
    2. A branch that starts neither at the residual's source nor at a depthwise convolution.
    3. A branch with an operation that mixes positions or is tied to the grid's size (see `papr_fx.positions`).
    4. Positions in one axis that cannot be traced back to rows and columns.

A class token in front of the positions is always kept, as in a token model.

Where values were moved into windows (MaxViT), the kept positions are had in their order: the nodes that moved them are
copied onto the numbers of the cells.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import cast

import torch
from torch import fx, nn

from ..dataflow.moves import Moves, copy_moves, find_moves, operands
from ..dataflow.positions import Layout, Positions, Verdict
from ..ops.positions import gather_pixels, moved_cells, number_cells, pixel_rows, with_prefix, write_pixels
from ..tracing.graphs import ancestors, descendants, shape_of
from ..tracing.joins import Join
from . import splice_proposal

# Sizes of a grid, or the number of its positions: known, or read at run time.
Grid = tuple[int | fx.Node, ...]

# More tokens than so many in front of the positions of a grid are none of class, distillation or registers.
_LONGEST_PREFIX = 16


@dataclass(frozen=True)
class Site:
    """A residual merge and the pixel operator that feeds it. Nodes are named, so that a site holds for copies of its graph.

    Attributes:
        name: What the operator's last pointwise layer calls.
        merge: The addition.
        residual: Its operand that passes by the operator.
        source: The value that the residual is a copy or a scaled form of.
        branch: Its other operand, the last node of the operator.
        region: The operator's nodes, in order.
        entries: The values that enter it, and their layouts.
        layout: Layout of residual, branch and merge.
        grid: Rows and columns on the traced images, of clips (frames, rows, columns).
        origin: The node where sizes of the grid can be read at run time, and their axes.
        masked: Nodes of the region in which dropped positions count as zeros.
        convolution: Whether a depthwise convolution feeds the operator.
        prefix: Tokens in front of the grid's positions, where these have one axis.
        moves: How its positions left the order of the image, if they did: into windows.
    """

    name: str
    merge: str
    residual: str
    source: str
    branch: str
    region: tuple[str, ...]
    entries: tuple[tuple[str, Layout], ...]
    layout: Layout
    grid: tuple[int, ...]
    origin: tuple[str, tuple[int, ...]]
    masked: tuple[tuple[str, Layout], ...]
    convolution: bool
    prefix: int = 0
    moves: Moves | None = None

    @property
    def ordered(self) -> tuple[str, Layout]:
        """A value in which its positions are in the order of the image, behind `prefix`, and its axes."""
        return (self.moves.origin, self.moves.layout) if self.moves else (self.residual, self.layout)


@dataclass(frozen=True)
class Left:
    """A residual merge that stays dense, and why."""

    merge: str
    reason: str


def find_sites(graph: fx.Graph, root: nn.Module, positions: Positions) -> tuple[tuple[Site, ...], tuple[Left, ...]]:
    """Finds every residual branch that can run on some positions, and says why others cannot.

    Args:
        graph: A traced graph whose nodes carry `shape` and `joins` in `meta`.
        root: The modules that it calls.
        positions: Tries nodes on numbers.
    """
    sites: list[Site] = []
    left: list[Left] = []
    varying = set(descendants(*graph.find_nodes(op="placeholder")))
    for merge in graph.nodes:
        pair = operands(merge)
        found = [_match(root, positions, varying, merge, *pair) for pair in (pair[::-1], pair)] if pair else []
        chosen = next((site for site in found if isinstance(site, Site)), None)
        if chosen:
            sites.append(chosen)
        else:
            left.extend(Left(merge.name, reason) for reason in found[::-1] if isinstance(reason, str))
    return tuple(sites), tuple(left)


def rewrite(
    graph: fx.Graph,
    sites: Sequence[Site],
    z: float,
    background: str,
    *,
    layout: str = "BCHW",
    training: bool = False,
    dynamic: bool = False,
) -> None:
    """Inserts the proposal, one choice of positions for each grid, and a gather and a write-back at each site.

    Args:
        graph: The graph to change; it holds the sites.
        sites: From `find_sites` on this graph or a copy of it.
        z: Keep ratio in (0, 1).
        background: "keep", "zero" or "auto": zero behind a depthwise convolution, and in training always keep.
        layout: Axes of the images or clips.
        training: Whether the graph is for training mode.
        dynamic: Whether the grid is read at run time.
    """
    nodes = {node.name: node for node in graph.nodes}
    images = splice_proposal.find_site(graph)
    choices: dict[tuple[int, ...], tuple[fx.Node, Grid]] = {}
    rows: dict[tuple[object, ...], tuple[fx.Node, Grid]] = {}
    first = images.images.next
    leads = {site.grid: site for site in sorted(sites, key=lambda site: nodes[site.region[0]], reverse=True)}
    for number, site in enumerate(sites):
        lead = leads[site.grid]  # the first to run; additions may come in another order
        if site.grid not in choices:
            before = nodes[lead.source].next if dynamic else first
            choices[site.grid] = _choose(graph, nodes, images, lead, z, before, dynamic=dynamic)
        order = site.moves and (site.moves.path if dynamic else site.moves.cells)  # other sizes may part what is equal here
        if (site.grid, site.prefix, order) not in rows:
            orders = sum(grid == site.grid for grid, *_ in rows)
            name = "x".join(map(str, site.grid)) + (f"_{orders}" if orders else "")
            with graph.inserting_before(choices[site.grid][0].next):
                rows[site.grid, site.prefix, order] = _index(graph, nodes, site, *choices[site.grid], name)
        index, grid = rows[site.grid, site.prefix, order]
        _rewrite_site(graph, nodes, site, number, index, grid, background_of(site, background, training))
    packed = {"BCHW": torch.channels_last, "BCTHW": torch.channels_last_3d}
    if layout in packed and any(site.layout == layout for site in sites):
        _lay_channels_last(graph, images, packed[layout])


def background_of(site: Site, background: str, training: bool) -> str:
    """What stands at dropped positions behind `site`: "keep" or "zero"."""
    if background != "auto":
        return background
    return "zero" if site.convolution and not training else "keep"


def is_depthwise(node: fx.Node, root: nn.Module) -> bool:
    """Whether `node` calls a convolution of one kernel for each channel, over more than one position."""
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(module, nn.Conv2d | nn.Conv3d):
        return False
    return module.groups == module.in_channels == module.out_channels > 1 and prod(module.kernel_size) > 1


def _match(
    root: nn.Module, positions: Positions, varying: set[fx.Node], merge: fx.Node, branch: fx.Node, residual: fx.Node
) -> Site | str | None:
    """The site of `branch`; why it is none; or nothing where there is no pointwise layer to prune."""
    sources = _sources(residual, root)
    region, entries, convolutions = _region(root, varying, merge, branch, sources)
    layers = [node for node in region if _is_pointwise(node, root)]
    if not layers:
        return None
    behind = f"`{layers[-1].target}`"
    fed = {node for conv in convolutions for node in ancestors(conv)}
    fed |= {part for node in fed if shape_of(node) is None for part in node.users}  # what passes beside it, of one split
    odd = [entry for entry in entries if entry not in fed and entry not in sources and entry not in convolutions]
    if odd or not entries:
        start = odd[0] if odd else None
        return f"{behind}: its branch starts at `{start}`, neither the residual's source nor a depthwise convolution"
    attempts: list[tuple[int, str]] = []
    for hypothesis in product(*(_hypotheses(entry, entry in convolutions) for entry in entries)):
        layouts = dict(zip(entries, hypothesis, strict=True))
        checked = _checked(positions, varying, region, layouts)
        if isinstance(checked, tuple):
            attempts.append(checked)
            continue
        out = layouts[branch]
        moves = find_moves(sources[-1], root) if len(out) == 4 else None
        grid = _grid(_upward(sources[-1], moves.origin), moves.layout) if moves else _grid(sources[-1], out)
        if grid is None:
            shape = shape_of(sources[-1])
            return f"{behind}: the positions of `{sources[-1]}` {shape} cannot be traced back to rows and columns"
        rank = len(shape_of(merge.graph.find_nodes(op="placeholder")[0]) or ()) - 2
        if len(grid[0]) != rank:
            return f"{behind}: its positions have {len(grid[0])} axes, those of the input {rank}"
        prefix = 0 if moves else _count(sources[-1], out) - prod(grid[0])
        if any(_count(node, layout) != prefix + prod(grid[0]) for node, layout in layouts.items() if shape_of(node)):
            return f"{behind}: its positions are not those of grid {grid[0]}"
        return Site(
            str(layers[-1].target),
            merge.name,
            residual.name,
            sources[-1].name,
            branch.name,
            tuple(node.name for node in region),
            tuple((entry.name, layouts[entry]) for entry in entries),
            out,
            grid[0],
            grid[1],
            tuple((node.name, layouts[node]) for node in region if node in checked),
            bool(convolutions),
            prefix,
            moves,
        )
    return f"{behind}: {max(attempts)[1]}"


def _sources(residual: fx.Node, root: nn.Module) -> list[fx.Node]:
    """The residual and what it is a copy or a scaled form of, through identities and modules of one vector."""
    found = [residual]
    while found[-1].op == "call_module" and len(found[-1].all_input_nodes) == 1:
        before = found[-1].all_input_nodes[0]
        module = root.get_submodule(str(found[-1].target))
        vectors = [parameter.ndim <= 1 for parameter in module.parameters()]
        scaled = isinstance(module, nn.Identity) or vectors == [True]
        if not scaled or shape_of(before) != shape_of(found[-1]):
            break
        found.append(before)
    return found


def _region(
    root: nn.Module, varying: set[fx.Node], merge: fx.Node, branch: fx.Node, sources: Iterable[fx.Node]
) -> tuple[list[fx.Node], list[fx.Node], list[fx.Node]]:
    """What feeds the merge alone, up to the sources and depthwise convolutions; the values that enter; the convolutions."""
    stops = set(sources)
    region: dict[fx.Node, None] = {}
    entries: dict[fx.Node, None] = {}
    wanted = {branch}
    node = merge
    while wanted - region.keys() - entries.keys() and (node := node.prev).op != "root":
        if node not in wanted:
            continue
        inside = all(user in region or user is merge for user in node.users)
        if node in stops or is_depthwise(node, root) or not inside or node not in varying:
            if node in varying:
                entries[node] = None
            else:
                wanted.discard(node)
            continue
        region[node] = None
        wanted.update(node.all_input_nodes)
    for entry in [e for e in entries if shape_of(e) is None]:  # parts of a split that others use too enter one by one
        del entries[entry]
        for user in [u for u in entry.users if u in region]:
            del region[user]
            entries[user] = None
    # both were met latest first
    return list(region)[::-1], list(entries)[::-1], [n for n in entries if is_depthwise(n, root)]


def _upward(node: fx.Node, name: str) -> fx.Node:
    """The node of that name in front of `node`."""
    while node.name != name:
        node = node.prev
    return node


def _is_pointwise(node: fx.Node, root: nn.Module) -> bool:
    """Whether `node` is, or calls a module that holds, a Linear or a 1x1 convolution."""
    if node.op != "call_module":
        return node.target is torch.nn.functional.linear
    modules = root.get_submodule(str(node.target)).modules()
    return any(isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d | nn.Conv3d) and prod(m.kernel_size) == 1) for m in modules)


def _hypotheses(entry: fx.Node, convolution: bool) -> tuple[Layout, ...]:
    axes = len(shape_of(entry) or ())
    if convolution:
        return ("BCHW" if axes == 4 else "BCTHW",)
    return {4: ("BHWC", "BCHW"), 5: ("BTHWC", "BCTHW")}.get(axes, ("BNC", "BCN"))


def _checked(
    positions: Positions, varying: set[fx.Node], region: Sequence[fx.Node], layouts: dict[fx.Node, Layout]
) -> set[fx.Node] | tuple[int, str]:
    """Completes `layouts` through the region and returns its masked nodes; else how far it got, and what failed."""
    masked: set[fx.Node] = set()
    for count, node in enumerate(region):
        known = all(n in layouts or n not in varying for n in node.all_input_nodes)
        if not known or (shape_of(node) is None and "parts" not in node.meta):
            verdict = Verdict(reason="handles sizes of the images, so it is tied to the grid")
        else:
            verdict = positions.verdict(node, layouts)
        if not verdict.layout:
            return count, f"`{node.target if node.op == 'call_module' else node.name}` {verdict.reason}"
        layouts[node] = verdict.layout
        if verdict.masked:
            masked.add(node)
    return masked


def _count(node: fx.Node, layout: Layout) -> int:
    return prod(size for size, letter in zip(cast("tuple[int, ...]", shape_of(node)), layout, strict=True) if letter in "THWN")


def _grid(entry: fx.Node, layout: Layout) -> tuple[tuple[int, ...], tuple[str, tuple[int, ...]]] | None:
    """The grid of the positions in `entry`, and the node and axes where its sizes can be read."""
    shape = cast("tuple[int, ...]", shape_of(entry))
    axes = tuple(layout.index(letter) for letter in "THW" if letter in layout)
    if axes:
        return tuple(shape[axis] for axis in axes), (entry.name, axes)
    found = _flattened(entry, layout.index("N"))
    if found is None:
        return None
    node, join = found
    return join.grid, (node.all_input_nodes[0].name, join.axes)


def _flattened(node: fx.Node, axis: int) -> tuple[fx.Node, Join] | None:
    """The node that made one axis of a grid, upstream of `node` through what keeps positions in their places."""
    count = cast("tuple[int, ...]", shape_of(node))[axis]
    images = cast("tuple[int, ...]", shape_of(node.graph.find_nodes(op="placeholder")[0]))
    while True:
        before = next((n for n in node.all_input_nodes if len(shape_of(n) or ()) == 3), None)
        shape = shape_of(before) if before else None
        if before is None or shape is None or count not in shape[1:]:
            return _joined(node, count, images) or next(
                (found for above in ancestors(node) if (found := _joined(above, count, images, prefixed=True))), None
            )
        if node.target in ("transpose", "permute", torch.transpose, torch.permute):
            axis = 3 - axis
        if shape[axis] != count or (node.op == "call_method" and node.target not in ("transpose", "permute", "contiguous")):
            return None
        node = before


def _product(graph: fx.Graph, sizes: Grid, name: str) -> fx.Node | int:
    """The number of positions of a grid whose sizes are nodes."""
    count = sizes[0]
    for size in sizes[1:]:
        count = graph.create_node("call_function", operator.mul, (count, size), name=f"papr_count_{name}")
    return count


def _joined(node: fx.Node, count: int, images: tuple[int, ...], *, prefixed: bool = False) -> tuple[fx.Node, Join] | None:
    """The node and its join, if it made one axis of a grid of `count` positions; `prefixed`: of some less, over the images."""
    height, width = images[-2:]
    for join in node.meta.get("joins", []):
        if len(join.grid) != len(images) - 2 or join.windows:
            continue
        prefix = count - prod(join.grid)
        over = abs(join.grid[-2] * width / height - join.grid[-1]) < 1  # heads and their channels are joined too
        if (0 < prefix <= _LONGEST_PREFIX and over) if prefixed else prefix == 0:
            return node, join
    return None


def _choose(
    graph: fx.Graph,
    nodes: Mapping[str, fx.Node],
    images: splice_proposal.Site,
    site: Site,
    z: float,
    before: fx.Node,
    *,
    dynamic: bool,
) -> tuple[fx.Node, Grid]:
    """The kept positions of a grid, in front of node `before`, and the grid's sizes."""
    grid: Grid = site.grid
    name = "x".join(map(str, site.grid))
    with graph.inserting_before(before):
        if dynamic:
            node, axes = nodes[site.origin[0]], site.origin[1]
            shape = graph.create_node("call_function", getattr, (node, "shape"), name=f"papr_shape_{name}")
            grid = tuple(
                graph.create_node("call_function", operator.getitem, (shape, axis), name=f"papr_{word}_{name}")
                for axis, word in zip(axes, ("frames", "rows", "columns")[-len(axes) :], strict=True)
            )
    return splice_proposal.rewrite(graph, images, before, grid, z, name=name), grid


def _index(
    graph: fx.Graph, nodes: Mapping[str, fx.Node], site: Site, keep: fx.Node, grid: Grid, name: str
) -> tuple[fx.Node, Grid]:
    """The flat rows of kept positions in the order of the site's values, and the sizes that these have."""
    sizes = grid
    if site.moves:
        cells = graph.create_node("call_function", number_cells, (keep, grid, site.moves.layout), name=f"papr_cells_{name}")
        path = [nodes[step] for step in site.moves.path]
        moved = copy_moves(graph, nodes[site.moves.origin], path, cells)[-1]
        keep = graph.create_node("call_function", moved_cells, (keep, moved), name=f"papr_moved_{name}")
        sizes = (prod(site.grid),)
        if grid != site.grid:
            sizes = (_product(graph, grid, name),)
    if site.prefix:
        count: fx.Node | int = prod(site.grid) + site.prefix
        if grid != site.grid:
            count = graph.create_node("call_function", operator.add, (_product(graph, grid, name), site.prefix))
        keep = graph.create_node("call_function", with_prefix, (keep, site.prefix), name=f"papr_all_{name}")
        grid = sizes = (count,)
    return graph.create_node("call_function", pixel_rows, (keep, grid), name=f"papr_index_{name}"), sizes


def _rewrite_site(
    graph: fx.Graph,
    nodes: dict[str, fx.Node],
    site: Site,
    number: int,
    index: fx.Node,
    grid: Grid,
    background: str,
) -> None:
    region = [nodes[name] for name in site.region]
    with graph.inserting_before(region[0]):
        for name, layout in site.entries:
            entry = nodes[name]
            gathered = graph.create_node(
                "call_function", gather_pixels, (entry, index, grid, layout), name=f"papr_pixels_{number}"
            )
            for node in region:
                node.replace_input_with(entry, gathered)
    merge = nodes[site.merge]
    arguments = (nodes[site.residual], nodes[site.branch], index, site.layout, background)
    with graph.inserting_before(merge):
        written = graph.create_node("call_function", write_pixels, arguments, name=f"papr_out_{number}")
    merge.replace_all_uses_with(written)
    graph.erase_node(merge)
    nodes[site.merge] = written  # later sites know the sum by its name


def _lay_channels_last(graph: fx.Graph, images: splice_proposal.Site, memory_format: torch.memory_format) -> None:
    """Positions are rows of memory in channels-last images alone: converted once here, not at each gather."""
    with graph.inserting_after(images.images):
        laid_out = graph.create_node(
            "call_method", "contiguous", (images.images,), {"memory_format": memory_format}, name="papr_channels_last"
        )
    images.images.replace_all_uses_with(laid_out, delete_user_cb=lambda user: user is not laid_out)
