"""Part 12, fusing: attention that was written out is one call."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from ..passes.kinds import Kind
from ..tracing.graphs import nodes_by_name
from ..tracing.numerics import relative_error
from ..tracing.roles import find_all, number_of
from ..tracing.sources import GraphModule
from .case import Case, ComparisonError, PrecisionError

# What each call is compared with: itself without one of these.
_CONTROLS = {"its scale": {"scale": 0.0}, "what is added to its scores": {"attn_mask": None}}


class FusingError(ComparisonError):
    """The graph that calls fused attention differs from the one that writes it out. That one may still be right."""


def check(case: Case) -> None:
    """Keeps two thirds of the positions: each attention, and the output, must be those of the graph that writes it out.

    Each call without its scale, and without what is added to its scores, must give something else.

    Fault: a forgotten mask, a wrong scale, masks of other windows. The other parts do not find it: they are about the graph
    that writes attention out. Each attention is compared, as one among many moves the output by little.
    Example: masks repeated for each window instead of each image: an attention is off by 0.5, the output by 3e-4.
    Does nothing where nothing is fused.

    Raises:
        FusingError: The results differ, or do not depend on scales or masks.
    """
    if not case.rewrite.fuses:
        return
    fused, written = case.rewrite.graph_on(), case.rewrite.graph_on(fuse=False)
    calls, nodes = find_all(fused, Kind.FUSED), nodes_by_name(written)
    mixed = [nodes[case.rewrite.plan.fusing.sites[number_of(call)].mixed] for call in calls]
    controls = [(call, what, other) for call in calls for what, other in _without(call)]
    expected, wanted = _run(case, written, mixed)
    try:
        found, values = _run(case, fused, [*calls, *(other for _, _, other in controls)])
    except PrecisionError as error:
        raise FusingError(f"fusing: {error}") from error
    errors = dict(zip(calls, map(relative_error, values, wanted), strict=False))
    worst = max([*errors.values(), relative_error(found, expected)])
    if not worst <= case.tolerance:
        raise FusingError(
            f"fusing: with attention as one call, values are off by {worst:.1e} (relative; {case.tolerance:.0e} is allowed)"
        )
    own = dict(zip(calls, wanted, strict=True))
    for (call, what, _), value in zip(controls, values[len(calls) :], strict=True):
        moved = relative_error(value, own[call])
        if not moved > 10 * max(case.tolerance, errors[call]):
            name = case.rewrite.plan.fusing.sites[number_of(call)].mixed
            raise FusingError(
                f"fusing: without {what} the attention `{name}` moves by only {moved:.1e}, so the proof would not see a fault"
            )


def _without(call: fx.Node) -> list[tuple[str, fx.Node]]:
    """The same call in other words, each without one of its arguments: what that is, and the node."""
    found: list[tuple[str, fx.Node]] = []
    for what, changed in _CONTROLS.items():
        if call.kwargs.keys() >= changed.keys():
            with call.graph.inserting_after(call):
                options = {**call.kwargs, **changed}
                other = call.graph.create_node("call_function", F.scaled_dot_product_attention, call.args, options)
            found.append((what, other))
    return found


def _run(case: Case, graph: fx.Graph, nodes: list[fx.Node]) -> tuple[Any, list[Tensor]]:
    """What a graph returns, and the values of some of its nodes."""
    output = graph.output_node()
    output.args = ((output.args[0], nodes),)
    kept = [cells[:, : max(1, 2 * cells.shape[1] // 3)] for cells in case.orders]  # of all images, which a mask may mix up
    return case.run(GraphModule(case.root, graph), case.images, *case.indices(kept))
