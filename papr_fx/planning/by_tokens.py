"""Plans the pruning of a token model: which graph, which site, and whether its blocks run on fewer tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress

import torch
from torch import Tensor, fx, nn

from ..dataflow.attentions import MustOpenError
from ..errors import ArgumentError, NoSiteError, TraceError
from ..passes import gather_positions, prune_tokens, reduce_tokens
from ..proposals.network import SignificanceNet
from ..review.diff import graph_text
from ..tracing.blocks import ancestors_of, find_blocks
from ..tracing.fakes import MODEL_ERRORS, scratch_copy
from ..tracing.graphs import cut, descendants, fixed_value, propagate, shape_of
from ..tracing.trace import Traced, trace
from . import inputs
from .module import PrunedModule
from .plan import Plan, Tokens

_REFUSED = (
    "the blocks of {} do not run on fewer tokens: they use positions beyond the embedding in a way that no gather mends "
    "(a reshape to the grid, a window)"
)


def prune_by_tokens(
    model: nn.Module,
    images: Tensor,
    layout: str,
    proposal: Callable[[], SignificanceNet],
    z: float,
    merge: reduce_tokens.Reduction | None,
) -> PrunedModule:
    """Builds the model that runs on `z` of its tokens, below 1, and on fewer from block to block with `merge`; not yet proved.

    Raises:
        NoSiteError: There is no token stream, or its blocks do not run on fewer tokens.
        TraceError: The model's forward cannot be recorded.
    """
    unused: set[str] = set()
    while True:
        blocks = tuple(find_blocks(model, unused))
        try:
            root, plan, recorded = _plan(model, images, layout, z, blocks, merge)
            break
        except prune_tokens.UnusedError as error:
            unused.update(blocks)
            if not find_blocks(model, unused):
                raise error
    root.papr_proposal = proposal()
    gm = _built(root, plan)
    _check_reads(gm, blocks, recorded)
    return gm


def _plan(
    model: nn.Module,
    images: Tensor,
    layout: str,
    z: float,
    blocks: tuple[str, ...],
    merge: reduce_tokens.Reduction | None,
) -> tuple[nn.Module, Plan, list[fx.Graph]]:
    """Traces the model in both modes; returns the modules that the graphs call, the plan, and all that was recorded."""
    if not blocks:
        raise NoSiteError(
            f"{type(model).__name__} has no repeated blocks: sought composite modules (modules of modules), found none"
        )
    opened = ancestors_of(blocks)

    def is_opened(_: nn.Module, name: str) -> bool:
        return name in opened

    while True:
        for name in opened:
            inputs.check_no_hooks(model.get_submodule(name), f"model.{name}")
        traced = trace(model, images, is_opened)
        site = prune_tokens.find_site(traced.graph, blocks)
        dynamic = _takes_other_sizes(cut(scratch_copy(traced.root(model)).eval(), traced.graph, site.stream), images, layout)
        if dynamic and site.join.op == "call_module" and site.join.target not in opened:
            opened.add(str(site.join.target))  # its sizes must be values of this graph
            continue
        try:
            found = _positions(model, traced, traced.graph, blocks, images)
            fewer = _reduced(model, traced, traced.graph, blocks, images, merge, found)
        except gather_positions.LengthError as clash:
            opened |= _alike(model, blocks, opened, clash)
            continue
        except MustOpenError as clash:
            opened |= _reachable(clash, opened)
            continue
        positions, reduced = {False: found, True: found}, {False: fewer, True: fewer}
        in_training = trace(model, images, is_opened, training=True)
        in_training = in_training.beside(traced)
        dense = {False: traced.graph, True: _training_graph(traced.graph, site, in_training.graph, blocks)}
        try:
            if dense[True] is not dense[False]:
                positions[True] = _positions(model, in_training, dense[True], blocks, images)
                reduced[True] = _reduced(model, in_training, dense[True], blocks, images, merge, positions[True])
            break
        except gather_positions.LengthError as clash:
            opened |= _alike(model, blocks, opened, clash)
        except MustOpenError as clash:
            opened |= _reachable(clash, opened)
    flags = {model.training, *(model.get_submodule(name).training for name in opened)}
    if dense[True] is not dense[False] and len(flags) > 1:
        raise ArgumentError(
            f"{type(model).__name__} is partly in training mode, and its code depends on it: call model.train() or model.eval()"
        )
    operator = Tokens(blocks, positions, merge, reduced)
    plan = Plan(type(model).__name__, dense, operator, frozenset(opened), dynamic, tuple(images.shape), layout, z)
    plan.dense_graph(model.training)
    return traced.root(model, in_training), plan, [traced.recorded, in_training.recorded]


def _positions(
    model: nn.Module, traced: Traced, graph: fx.Graph | str, blocks: tuple[str, ...], images: Tensor
) -> gather_positions.Found:
    if isinstance(graph, str):
        return gather_positions.Found()
    site = prune_tokens.find_site(graph, blocks)
    try:
        return gather_positions.find_sites(scratch_copy(traced.root(model)), graph, site, blocks, images)
    except NoSiteError as error:
        raise NoSiteError(f"{_REFUSED.format(type(model).__name__)}: {error}") from error


def _reduced(
    model: nn.Module,
    traced: Traced,
    graph: fx.Graph | str,
    blocks: tuple[str, ...],
    images: Tensor,
    merge: reduce_tokens.Reduction | None,
    positions: gather_positions.Found,
) -> reduce_tokens.Found:
    """Where `merge` leaves fewer tokens."""
    if merge is None or not merge.r or isinstance(graph, str):
        return reduce_tokens.Found()
    used = next((part for part in positions if part), ())
    if used:
        what = next(iter(vars(used[0]).values()))
        raise NoSiteError(
            f"merge: {type(model).__name__} uses positions beyond its embedding (`{what}`), and a merged token has none itself"
        )
    site = prune_tokens.find_site(graph, blocks)
    found = reduce_tokens.find_sites(scratch_copy(traced.root(model)), graph, site, blocks, merge.blocks, images)
    targets = {node.name: str(node.target) for node in graph.nodes}
    for attention in found.attentions:
        if attention.heads:  # its forward will not be called
            inputs.check_no_hooks(model.get_submodule(targets[attention.node]), f"model.{targets[attention.node]}")
    return found


def _reachable(clash: MustOpenError, opened: Collection[str]) -> set[str]:
    """The modules to be traced through, unless they were opened in vain."""
    if stuck := clash.modules & set(opened):
        raise NoSiteError(f"merge: the attention in `{min(stuck)}` cannot be reached, as its code cannot be traced through")
    return set(clash.modules)


def _alike(model: nn.Module, blocks: Collection[str], opened: Collection[str], clash: gather_positions.LengthError) -> set[str]:
    """The module that refuses fewer tokens and those of its class in the blocks, to be traced through."""
    kind = type(model.get_submodule(clash.module))
    if clash.module in opened or kind.__module__.startswith("torch.nn."):
        raise NoSiteError(f"{_REFUSED.format(type(model).__name__)}: {clash}") from clash
    alike = {name for name, module in model.named_modules(remove_duplicate=False) if type(module) is kind}
    return {name for name in alike if any(f"{name}.".startswith(f"{block}.") for block in blocks)} | {clash.module}


def _training_graph(graph: fx.Graph, site: prune_tokens.Site, training: fx.Graph, blocks: tuple[str, ...]) -> fx.Graph | str:
    """The graph for training mode: the one for eval mode where they agree, a reason where the tokens differ at the splice."""
    if graph_text(training) == graph_text(graph):
        return graph
    sizes = {node.name: shape_of(node) for node in training.nodes}
    for node in graph.nodes:
        shape, other = shape_of(node), sizes.get(node.name)
        if shape and other and len(shape) == len(other) == 3 and other[1] < shape[1]:
            return (
                f"`{node.target}` itself drops patches in training, {shape[1]} tokens to {other[1]} (patch dropout): the map "
                "would no longer say which token is which. Set its rate to 0"
            )
        if node is site.stream:
            break
    try:
        found = prune_tokens.find_site(training, blocks)
    except NoSiteError as error:
        return str(error)
    if (found.grid, found.prefix, found.block) != (site.grid, site.prefix, site.block):
        return (
            f"in training `{found.block}` reads {found.prefix} prefix tokens and grid {found.grid}, in eval mode "
            f"`{site.block}` reads {site.prefix} and {site.grid}"
        )
    return training


def _check_reads(gm: PrunedModule, blocks: tuple[str, ...], recorded: list[fx.Graph]) -> None:
    """Refuses a model in whose code Python went on with a number that pruning changes: the graph would hold the dense one."""
    for graph, training in zip(recorded, (False, True), strict=True):
        if isinstance(gm.plan.dense[training], str):
            continue
        stream = prune_tokens.find_site(graph, blocks).stream
        reads = [node for node in descendants(stream) if "read" in node.meta]
        before = {node: fixed_value(node) for node in reads}
        if not reads:
            continue
        hint = "which a graph would fix: compute with tensors or with `x.shape` itself there"
        try:
            propagate(gm.for_shapes(), gm.plan.prune(graph, training), gm.example())
        except TraceError as error:
            names = ", ".join(f"`{node.name}`" for node in reads)
            raise NoSiteError(f"the forward of {gm.plan.name} reads {names} as a Python number or length, {hint}") from error
        for node, value in before.items():
            if fixed_value(node) != value:
                raise NoSiteError(
                    f"the forward of {gm.plan.name} reads `{node.name}` as a Python number or length ({value} with all tokens, "
                    f"{fixed_value(node)} pruned), {hint}"
                )


def _takes_other_sizes(embedding: fx.GraphModule, images: Tensor, layout: str) -> bool:
    """Whether the part of the model in front of the blocks runs on images of other sizes."""
    for shape in inputs.other_sizes(images, layout):
        try:
            with torch.no_grad():
                fx.Interpreter(embedding).run(images.new_zeros(shape))
        except MODEL_ERRORS:
            continue
        return True
    return False


def _built(root: nn.Module, plan: Plan) -> PrunedModule:
    try:
        return PrunedModule(root, plan)
    except TraceError as error:
        if plan.reduction and plan.reduction.r:
            with suppress(TraceError):  # then merging is not the reason
                PrunedModule(root, plan.pruning)
                raise NoSiteError(f"merge: {plan.name} does not run on merged tokens: {str(error).splitlines()[0]}") from error
        raise NoSiteError(f"{_REFUSED.format(plan.name)}: {str(error).splitlines()[0]}") from error
