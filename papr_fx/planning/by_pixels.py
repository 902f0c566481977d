"""Plans the pruning of pixel operators: where they are, and which modules must be traced through to reach them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

from torch import Tensor, fx, nn

from ..dataflow.positions import Positions, Verdict
from ..errors import NoSiteError, TraceError
from ..passes import prune_pixels, prune_tokens
from ..passes.prune_pixels import Left, Site
from ..proposals.network import SignificanceNet
from ..tracing.blocks import find_blocks
from ..tracing.fakes import scratch_copy
from ..tracing.graphs import cut, propagate, shape_of
from ..tracing.trace import Traced, trace
from . import inputs
from .module import PrunedModule
from .plan import Pixels, Plan


def prune_by_pixels(
    model: nn.Module, images: Tensor, layout: str, proposal: Callable[[], SignificanceNet], z: float, background: str
) -> PrunedModule:
    """Builds the model whose pixel operators run on `z` of the positions, below 1; not yet proved.

    Raises:
        NoSiteError: No residual branch can be pruned; the message names the nearest miss.
        TraceError: The model's forward cannot be recorded.
    """
    known: dict[Any, Verdict] = {}
    opened, alone = _opened(model, images, known)
    for name in opened:
        inputs.check_no_hooks(model.get_submodule(name), f"model.{name}")
    traces = {mode: trace(model, images, lambda _, name: name in opened, training=mode) for mode in (False, True)}
    traces[True] = traces[True].beside(traces[False])
    found = {mode: _sites(model, traced, known, training=mode) for mode, traced in traces.items()}
    if not found[False][0]:
        raise _no_site(model, found[False][1])
    dense: dict[bool, fx.Graph | str] = {mode: traced.graph for mode, traced in traces.items()}
    if str(dense[True]) == str(dense[False]):
        dense[True] = dense[False]
    sites = {mode: pair[0] for mode, pair in found.items()}
    left = {False: alone, True: found[True][1]}
    if not sites[True]:
        dense[True] = f"none of its pixel operators treats positions alone in training: {left[True][-1].reason}"
    root = traces[False].root(model, traces[True])
    dynamic = _takes_other_sizes(root, traces[False].graph, images, layout, sites[False])
    operator = Pixels(sites, left, background)
    plan = Plan(type(model).__name__, dense, operator, frozenset(opened), dynamic, tuple(images.shape), layout, z)
    plan.dense_graph(model.training)
    root.papr_proposal = proposal()
    try:
        return PrunedModule(root, plan)
    except TraceError as error:
        raise NoSiteError(f"the pixel operators of {plan.name} do not run on some positions: {error}") from error


def keeps_space(model: nn.Module, gm: PrunedModule) -> bool:
    """Whether the model is no trunk of tokens: by its layout, several grids, or what its blocks return or convolve."""
    choices = gm.plan.choices(gm.training)
    if len(choices) > 1 or any(len(choice.layout) > 3 for choice in choices):
        return True
    blocks = find_blocks(model)
    calls = prune_tokens.calls(gm.plan.dense_graph(gm.training), blocks)
    if any(len(shape_of(nodes[-1]) or ()) > 3 for _, nodes in calls):
        return True
    inside = (module for name in blocks for module in model.get_submodule(name).modules())
    return any(isinstance(module, nn.Conv2d | nn.Conv3d) and prod(module.kernel_size) > 1 for module in inside)


def _opened(model: nn.Module, images: Tensor, known: dict[Any, Verdict]) -> tuple[set[str], tuple[Left, ...]]:
    """Which modules to trace through: those with an operator's parts and other things in them. All others stay whole.

    Beside them, what is left alone, seen with every module traced through, so that reasons name the smallest part.
    """
    traced = trace(model, images, lambda module, _: any(True for _ in module.children()))
    sites, left = _sites(model, traced, known, training=False)
    if not sites:
        raise _no_site(model, left)
    owners: dict[str, tuple[str, ...]] = {node.name: node.meta["inside"] for node in traced.graph.nodes}
    whole = Counter(owner for names in owners.values() for owner in names)
    opened: set[str] = set()
    for site in sites:
        masked = {name for name, _ in site.masked}
        alone = [name for name in site.region if name not in masked]
        inside = Counter(owner for name in alone for owner in owners[name])
        closed = {owner for owner, count in inside.items() if count == whole[owner]}
        visible = [site.merge, site.residual, site.branch, site.origin[0], *site.region, *(name for name, _ in site.entries)]
        visible += site.moves.path if site.moves else ()
        opened.update(owner for name in visible for owner in owners[name] if owner not in closed)
    return {name for name in opened if name and any(True for _ in model.get_submodule(name).children())}, left


def _sites(
    model: nn.Module, traced: Traced, known: dict[Any, Verdict], *, training: bool
) -> tuple[tuple[Site, ...], tuple[Left, ...]]:
    """The sites of a traced graph; not those in which Python went on with a number that pruning changes."""
    root = traced.root(model)
    sites, left = prune_pixels.find_sites(traced.graph, root, Positions(root, known, training=training))
    fixed = {site: read for site in sites if (read := _read_inside(traced.recorded, site))}
    refused = tuple(Left(site.merge, f"`{read}` is read there as a Python number or length") for site, read in fixed.items())
    return tuple(site for site in sites if site not in fixed), (*left, *refused)


def _read_inside(recorded: fx.Graph, site: Site) -> str | None:
    """The name of a value that Python read from inside the site's region, if any."""
    inside = set(site.region)
    for node in recorded.nodes:
        if node.name in inside or (node.name != site.merge and any(n.name in inside for n in node.all_input_nodes)):
            inside.add(node.name)
            if "read" in node.meta:
                return node.name
    return None


def _no_site(model: nn.Module, left: Iterable[Left]) -> NoSiteError:
    reasons = [f"`{miss.merge}`, {miss.reason}" for miss in left]
    found = f"the nearest miss is {reasons[-1]}" if reasons else "found no residual addition whose branch holds one"
    return NoSiteError(
        f"{type(model).__name__} has no pixel operator to prune: sought a residual branch with a Linear or 1x1 convolution "
        f"that treats every position alone, {found}"
    )


def _takes_other_sizes(root: nn.Module, graph: fx.Graph, images: Tensor, layout: str, sites: Sequence[Site]) -> bool:
    """Whether the model runs on images of other sizes, and its grids follow them; tried on shapes alone.

    They do not where a grid holds padding, or where two grids are alike at the traced size by chance.
    """
    height, width = images.shape[-2:]
    whole = cut(scratch_copy(root), graph, *graph.output_node().all_input_nodes)
    rows, columns = (side // count for side, count in zip((height, width), sites[0].grid[-2:], strict=True))  # of a position
    shapes = inputs.other_sizes(images, layout, (height + rows, width + 3 * columns))
    answers = [_follows(whole, images, layout, shape, sites) for shape in shapes]
    taken = [answer for answer in answers if answer is not None]
    return bool(taken) and all(taken)


def _follows(whole: fx.GraphModule, images: Tensor, layout: str, shape: tuple[int, ...], sites: Sequence[Site]) -> bool | None:
    """Whether grids grow with the image, and like ones alike, on images of that size; None if the model refuses it."""
    try:
        propagate(whole, whole.graph, images.new_empty(shape))
    except TraceError:
        return None
    shapes = {node.name: shape_of(node) or () for node in whole.graph.nodes}
    grids: dict[tuple[int, ...], set[tuple[int, ...]]] = defaultdict(set)
    for site in sites:
        name, axes = site.origin
        if max(axes) >= len(shapes[name]):  # a module joined them inside
            return False
        grids[site.grid].add(tuple(shapes[name][axis] for axis in axes))
    axes = [layout.index(letter) for letter in "THW" if letter in layout]
    scale = [shape[axis] / images.shape[axis] for axis in axes]
    return all(
        abs(count - before * by) < 1
        for grid, found in grids.items()
        for counts in found
        for count, before, by in zip(counts, grid, scale, strict=True)
    ) and all(len(found) == 1 for found in grids.values())
