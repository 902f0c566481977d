"""Plans the pruning of pixel operators: where they are, and which modules must be traced through to reach them."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import NamedTuple

from torch import Tensor, fx, nn

from ..dataflow.moves import residual_of
from ..dataflow.positionwise import PositionwiseProbe, VerdictCache
from ..errors import NoSiteError, TraceError
from ..ops import TokenRows
from ..passes import fuse_attention, prune_pixels
from ..passes.fuse_attention import Fusing
from ..passes.prune_pixels import PixelSite, Skipped
from ..proposals.network import SignificanceNet
from ..tracing.asked import casts_images, with_questions
from ..tracing.blocks import block_calls
from ..tracing.fakes import scratch_copy
from ..tracing.graphs import cut, nodes_by_name, same_graph, shape_of
from ..tracing.trace import Traced, trace
from . import inputs
from .attentions import attentions_in, composite, with_attentions
from .ends import tokens_behind
from .example import Example
from .modes import PixelPlan, Refused, Target
from .module import PrunedModule
from .plan import Plan
from .reads import check_batch_reads, named_read
from .signature import Signature
from .sizes import grids_follow, taken_sizes


class _Found(NamedTuple):
    """The sites of a traced graph, and the residual branches that are not sites."""

    sites: tuple[PixelSite, ...]
    skipped: tuple[Skipped, ...]


class _Opened(NamedTuple):
    """Which modules to trace through.

    Attributes:
        needed: Qualified names of those that hold parts of an operator, and other things.
        attentions: The same of those that hold attention that can be one call.
        skipped: The residual branches that are not sites.
    """

    needed: frozenset[str]
    attentions: frozenset[str]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class PixelOptions:
    """How pixel operators are pruned.

    Attributes:
        z: Keep ratio, below 1.
        background: What dropped positions hold afterwards: "keep", "zero" or "auto".
        fuse: Whether attention that is written out becomes one call.
    """

    z: float
    background: str
    fuse: bool = True


def prune_by_pixels(request: inputs.Request, proposal: Callable[[], SignificanceNet], options: PixelOptions) -> PrunedModule:
    """Builds the model whose pixel operators run on some of the positions. Not yet proved.

    Raises:
        NoSiteError: No residual branch can be pruned; the message names the nearest miss.
        TraceError: The model's forward cannot be recorded.
    """
    planner = _Planner(request, proposal, options, VerdictCache())
    opened = _opened(request, planner.cache)
    for name in opened.needed:
        inputs.check_no_hooks(request.model.get_submodule(name), f"model.{name}")
    attentions = opened.attentions - opened.needed if options.fuse else frozenset[str]()
    return with_attentions(request, attentions, lambda names: planner.pruned(opened._replace(attentions=names)))


def keeps_space(model: nn.Module, gm: PrunedModule, blocks: Sequence[str]) -> bool:
    """Whether a model keeps a spatial layout: several grids, values with a grid, or convolutions in its blocks."""
    mode = gm.plan.mode(gm.training)
    choices = mode.choices()
    if len(choices) > 1 or any(len(choice.layout) > 3 for choice in choices):
        return True
    if any(len(shape_of(nodes[-1]) or ()) > 3 for _, nodes in block_calls(mode.dense, blocks)):
        return True
    inside = (module for name in blocks for module in model.get_submodule(name).modules())
    return any(isinstance(module, nn.Conv2d | nn.Conv3d) and prod(module.kernel_size) > 1 for module in inside)


@dataclass(frozen=True)
class _Planner:
    """Plans a model for a choice of modules that are traced through. See `prune_by_pixels`."""

    request: inputs.Request
    proposal: Callable[[], SignificanceNet]
    options: PixelOptions
    cache: VerdictCache

    def pruned(self, opened: _Opened) -> PrunedModule:
        """The planned model."""
        model, images, layout = self.request
        through = opened.needed | opened.attentions
        record = partial(trace, opened=lambda _, name: name in through)
        traced = record(model, images)
        check_batch_reads(traced, model, images)
        in_training = record(model, images, training=True).beside(traced)
        found = _find(self.request, traced, self.cache, training=False)
        if not found.sites:
            raise _no_site(model, found.skipped)
        dense = train_dense = with_questions(traced.graph, model, images, record)
        if not same_graph(in_training.graph, traced.graph):
            train_dense = with_questions(in_training.graph, model, images, partial(record, training=True))
        eval_plan = PixelPlan(dense, found.sites, opened.skipped, self.options.background, training=False)
        train_plan = _training_plan(eval_plan, train_dense, _find(self.request, in_training, self.cache, training=True))
        root = traced.root(model, in_training)
        grids = [(site.rows, site.placing.origin) for site in found.sites]
        step = [side // count for side, count in zip(images.shape[-2:], grids[0][0].grid[-2:], strict=True)]  # of one position
        odd = (images.shape[-2] + step[0], images.shape[-1] + 3 * step[1])
        taken = taken_sizes(scratch_copy(model).eval(), lambda: traced.module(model), images, layout, odd)
        follows = bool(taken) and grids_follow(traced.module(model), images, taken, layout, grids)
        target = Target(self.options.z, layout, tuple(taken) if follows else ())
        name = type(model).__name__
        example = Example.of(model, images)
        signature = Signature.of(model) if follows else Signature.of(model).for_size(images.shape, layout)
        floating, integers = casts_images(traced.graph, model, images, record) if example.follows else (False, False)
        if floating:
            signature = signature.casting(example.like, integers=integers)
        plan = Plan(name, eval_plan, train_plan, frozenset(through), example, target, signature)
        if self.options.fuse:
            plan = replace(plan, fusing=Fusing(fuse_attention.find_sites(traced.graph, root)))
        plan.mode(model.training)  # refuses a mode that cannot be pruned
        root.papr_proposal = network = self.proposal()
        try:
            return PrunedModule(root, plan.seeing(network))
        except TraceError as error:
            raise NoSiteError(f"the pixel operators of {plan.name} do not run on a subset of the positions: {error}") from error


def _training_plan(eval_plan: PixelPlan, dense: fx.Graph, found: _Found) -> PixelPlan | Refused:
    if not found.sites:
        return Refused(f"none of its pixel operators is position-wise in training: {found.skipped[-1].reason}")
    return PixelPlan(dense, found.sites, found.skipped, eval_plan.background, training=True)


def _opened(request: inputs.Request, cache: VerdictCache) -> _Opened:
    """Which modules to trace through: those that hold parts of an operator and other things. All others stay whole.

    Everything is found with every module traced through, so that reasons name the smallest part.
    """
    model = request.model
    traced = trace(model, request.images, lambda module, _: any(True for _ in module.children()))
    found = _find(request, traced, cache, training=False)
    if not found.sites:
        raise _no_site(model, found.skipped)
    owners: dict[str, tuple[str, ...]] = {node.name: node.meta["inside"] for node in traced.graph.nodes}
    total = Counter(owner for names in owners.values() for owner in names)
    opened: set[str] = set()
    for site in found.sites:
        masked = {name for name, _ in site.masked}
        inside = Counter(owner for name in site.region if name not in masked for owner in owners[name])
        whole = {owner for owner, count in inside.items() if count == total[owner]}  # modules inside the operator
        visible = [
            site.addition,
            site.residual,
            site.branch,
            site.placing.origin.node,
            *site.region,
            *(n for n, _ in site.entries),
        ]
        visible += site.placing.moves.path if site.placing.moves else ()
        opened.update(owner for name in visible for owner in owners[name] if owner not in whole)
    needed = composite(model, opened)
    return _Opened(frozenset(needed), attentions_in(model, traced, needed), found.skipped)


def _find(request: inputs.Request, traced: Traced, cache: VerdictCache, *, training: bool) -> _Found:
    """The sites of a traced graph, without those in which code reads a number that pruning changes."""
    model, images, _ = request
    root = traced.root(model)
    matched, skipped = prune_pixels.find_sites(traced.graph, root, PositionwiseProbe(root, cache, training=training))
    sites: list[PixelSite] = []
    for site in matched:
        try:
            sites.append(_with_ends(site, model, traced, images) if site.rows.prefix else site)
        except NoSiteError as error:
            skipped = (*skipped, Skipped(site.addition, f"`{site.name}`: {error}"))
    fixed = {site: read for site in sites if (read := _read_inside(traced.recorded, site))}
    refused = tuple(Skipped(s.addition, f"{read} is read there as a Python number or length") for s, read in fixed.items())
    return _Found(tuple(site for site in sites if site not in fixed), (*skipped, *refused))


def _with_ends(site: PixelSite, model: nn.Module, traced: Traced, images: Tensor) -> PixelSite:
    """A site whose other tokens may stand in front of its patches or behind them, with those told apart.

    A branch spreads a patch over all tokens. Without the branches, it stays in its place.
    """
    graph = copy.deepcopy(traced.graph)
    for node in graph.nodes:
        if residual := residual_of(node):
            node.op, node.target, node.args = "call_function", operator.pos, (residual,)
    part = cut(traced.scratch_root(model).eval(), graph, nodes_by_name(graph)[site.ordered[0]])
    behind = tokens_behind(part, images, site.rows)
    return site.with_rows(TokenRows(site.rows.grid, site.rows.prefix - behind, behind))


def _read_inside(recorded: fx.Graph, site: PixelSite) -> str | None:
    """A value in the site's region that code read as a number, and where, if any."""
    inside = set(site.region)
    for node in recorded.nodes:
        if node.name in inside or (node.name != site.addition and any(n.name in inside for n in node.all_input_nodes)):
            inside.add(node.name)
            if "read" in node.meta:
                return named_read(node)
    return None


def _no_site(model: nn.Module, skipped: Iterable[Skipped]) -> NoSiteError:
    reasons = [f"`{miss.addition}`, {miss.reason}" for miss in skipped]
    found = f"the nearest miss is {reasons[-1]}" if reasons else "found no residual addition whose branch holds one"
    return NoSiteError(
        f"{type(model).__name__} has no pixel operator to prune: sought a residual branch with a Linear or 1x1 convolution "
        f"that treats every position independently, {found}"
    )
