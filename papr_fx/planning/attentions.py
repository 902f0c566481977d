"""Which modules hold attention that can be one call, so that they are traced through."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from torch import nn

from ..errors import PaprError, TraceError, first_line
from ..ops import is_watched
from ..passes import fuse_attention
from ..tracing.blocks import ancestors_of, is_inside
from ..tracing.fakes import scratch_copy
from ..tracing.trace import Traced, trace
from . import inputs
from .module import PrunedModule
from .sizes import takes_others


def attentions_in(model: nn.Module, traced: Traced, needed: Collection[str] = ()) -> frozenset[str]:
    """Qualified names of the modules around attention that can be one call, in a trace through all modules.

    Those with hooks stay whole, unless they are traced through anyway.

    Args:
        model: The model.
        traced: Its trace.
        needed: Modules that are traced through anyway.
    """
    owners: dict[str, tuple[str, ...]] = {node.name: node.meta["inside"] for node in traced.graph.nodes}
    found: set[str] = set()
    for site in fuse_attention.find_sites(traced.graph, traced.root(model)):
        around = composite(model, (owner for name in site.nodes for owner in owners[name]))
        if not any(is_watched(model.get_submodule(name)) for name in around - {*needed}):
            found |= around
    return frozenset(found)


def attentions_of_blocks(request: inputs.Request, blocks: tuple[str, ...]) -> frozenset[str]:
    """The same for the blocks of a token model. Only if the first one holds such attention, all are looked at."""
    model, images, _ = request
    around = ancestors_of(blocks)
    for inside in (blocks[:1], blocks):

        def opens(module: nn.Module, name: str, inside: tuple[str, ...] = inside) -> bool:
            return name in around or (any(is_inside(name, b) for b in inside) and any(True for _ in module.children()))

        try:
            found = attentions_in(model, trace(model, images, opens), around)
        except TraceError:
            return frozenset()
        if not found - around:
            return frozenset()
    return found


def with_attentions(
    request: inputs.Request, attentions: frozenset[str], plan: Callable[[frozenset[str]], PrunedModule]
) -> PrunedModule:
    """The planned model with these modules traced through, unless that costs something: then without.

    Args:
        request: The model and its images.
        attentions: Modules that nothing but fusing asks to trace through.
        plan: Plans the model with such modules traced through.
    """
    nothing: frozenset[str] = frozenset()
    if not attentions:
        return plan(nothing)
    try:
        fused = plan(attentions)
    except PaprError as error:  # their code cannot be recorded, or no pass can follow it
        return _written_out(plan(nothing), first_line(error))
    if fused.plan.target.dynamic or not takes_others(scratch_copy(request.model).eval(), *request[1:]):
        return fused
    whole = plan(nothing)  # a module may follow the size of the images where its recorded code does not
    if not whole.plan.target.dynamic:
        return fused
    return _written_out(whole, "traced through, the modules of attention would take one size of images only")


def _written_out(gm: PrunedModule, reason: str) -> PrunedModule:
    """The module, which says why its attention stays as it is written."""
    if not gm.plan.fusing.sites:
        gm.plan = gm.plan.writing_out(reason)
    return gm


def composite(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those of some modules that hold others; without the model itself."""
    return {name for name in names if name and any(True for _ in model.get_submodule(name).children())}
