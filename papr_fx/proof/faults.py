"""Faults that are planted in a rewritten graph, one at a time: what a proof must see.

Each changes the last call of one kind that a pass has put in, which is the one that least follows from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .. import ops
from ..errors import TraceError, VerifyError, first_line
from ..passes.kinds import Kind
from ..planning.modes import Stage
from ..planning.module import PrunedModule, shell
from ..planning.plan import Plan
from ..tracing.numerics import relative_error
from ..tracing.roles import has_role
from ..tracing.sources import GraphModule
from .case import Case
from .prove import prove

NOTHING = "changes nothing here"


class GraphFault(NamedTuple):
    """A fault.

    Attributes:
        name: What is wrong.
        of: What it changes: calls of a function, or nodes of a kind.
        change: Changes one of them.
    """

    name: str
    of: Callable[..., Any] | Kind
    change: Callable[[fx.Node], object]

    def fits(self, node: fx.Node) -> bool:
        """Whether it can be planted there."""
        return has_role(node, self.of) if isinstance(self.of, Enum) else node.target is self.of

    def plant(self, graph: fx.Graph) -> None:
        """Plants it, if there is a place for it."""
        places = [node for node in graph.nodes if self.fits(node)]
        if places:
            self.change(places[-1])


def seen_faults(model: nn.Module, gm: PrunedModule) -> dict[str, str]:
    """Plants each fault that fits a module in a copy of it, and proves that copy.

    Args:
        model: The model that was transformed.
        gm: The result, which is right.

    Returns:
        What the proof said, by fault, or that the fault changes nothing here.

    Raises:
        VerifyError: A fault that changes the output was not seen.
    """
    right = _output(model, gm)
    return {fault.name: _said(model, gm, fault, right) for fault in FAULTS if any(map(fault.fits, gm.graph.nodes))}


def _said(model: nn.Module, gm: PrunedModule, fault: GraphFault, right: Any) -> str:
    try:
        faulty = PrunedModule(shell(gm), _FaultyPlan.of(gm.plan, fault))
    except TraceError as error:
        return first_line(error)
    try:
        prove(model, faulty)
    except VerifyError as error:
        return str(error)
    if relative_error(_output(model, faulty), right) < 1e-9:
        return NOTHING
    raise VerifyError(
        f"planted faults: {gm.plan.name} passed its proof with a fault that changes its output ({fault.name}), so "
        "the proof does not see enough of this model"
    )


def _output(model: nn.Module, gm: PrunedModule) -> Any:
    case = Case.of(model, gm, gm.example().dtype)
    return case.run(GraphModule(case.root, case.own_graph), case.images)


@dataclass(frozen=True)
class _FaultyPlan(Plan):
    """A plan whose rewritten graphs have a fault."""

    fault: GraphFault | None = None

    @classmethod
    def of(cls, plan: Plan, fault: GraphFault) -> _FaultyPlan:
        return cls(**{field.name: getattr(plan, field.name) for field in fields(plan)}, fault=fault)

    def prune(self, graph: fx.Graph, training: bool, stage: Stage = lambda name, graph: None) -> fx.Graph:
        graph = super().prune(graph, training, stage)
        if self.fault is not None:
            self.fault.plant(graph)
        return graph


def _calls(wrong: Callable[..., Any]) -> Callable[[fx.Node], object]:
    """Calls another function with the same arguments."""
    return lambda node: setattr(node, "target", wrong)


def _mirrored(significance: Tensor, grid: Any) -> Tensor:
    return ops.resize_map(significance, grid).flip(-1)


def _worst(psm: Tensor, *rest: Any) -> Tensor:
    return ops.top_positions(-psm, *rest)


def _fewer(psm: Tensor, z: float, *rest: Any) -> Tensor:
    return ops.top_positions(psm, 0.7 * z, *rest)


def _worst_quads(psm: Tensor, *rest: Any) -> Tensor:
    return ops.choose_quads(-psm, *rest)


def _next_tokens(tokens: Tensor, keep: Tensor) -> Tensor:
    return ops.gather_tokens(tokens, (keep + 1) % tokens.shape[1])


def _flipped_entries(value: Tensor, keep: Tensor, *rest: Any) -> Tensor:
    return ops.gather_positions(value, keep.flip(1), *rest)


def _with_prefix(keep: Tensor, prefix: int, suffix: int = 0) -> Tensor:
    return ops.kept_patches(keep, prefix, suffix) + prefix


def _other_pixels(x: Tensor, rows: Tensor, *rest: Any) -> Tensor:
    return ops.gather_pixels(x, rows.roll(1), *rest)


def _written_elsewhere(residual: Tensor, branch: Tensor, rows: Tensor, *rest: Any) -> Tensor:
    return ops.write_pixels(residual, branch, rows.roll(1), *rest)


def _other_background(residual: Tensor, branch: Tensor, rows: Tensor, layout: str, background: str) -> Tensor:
    return ops.write_pixels(residual, branch, rows, layout, "zero" if background == "keep" else "keep")


def _in_image_order(keep: Tensor, cells: Tensor) -> Tensor:
    return keep


def _later_rows(node: fx.Node) -> None:
    value, axis, start, count = node.args
    assert isinstance(start, int)
    node.args = (value, axis, start + 1, count)


def _other_outputs(x: Tensor, layer: nn.Module, start: int, stop: int) -> Tensor:
    return ops.linear_columns(x, layer, start, stop).roll(1, -1)


def _other_columns(x: Tensor, *rest: Any) -> Tensor:
    return ops.split_columns(x.roll(1, -1), *rest)


def _mirrored_patches(images: Tensor, keep: Tensor, conv: nn.Module) -> Tensor:
    return ops.embed_patches(images.flip(-1), keep, conv)


def _fine_quads(images: Tensor, keep: Tensor, conv: nn.Module, halved: Tensor, *rest: Any) -> Any:
    return ops.embed_quads(images, keep, conv, images, *rest)


def _not_halved(images: Tensor, grid: Any, patch: Any) -> Tensor:
    return images


def _other_quads(tokens: Tensor, halved: Tensor, members: Tensor, prefix: int) -> Tensor:
    return ops.join_quads(tokens, halved, members.roll(1, 0), prefix)


def _tables_of_other_quads(value: Tensor, members: Tensor, *rest: Any) -> Tensor:
    return ops.add_quads(value, members.roll(1, 0), *rest)


def _other_places(value: Tensor, places: Tensor, *rest: Any, **options: Any) -> Tensor:
    return ops.restore_places(value, places.flip(1), *rest, **options)


def _filled_by_the_first(places: Tensor, grid: Any) -> Tensor:
    return places.clamp(min=0)


def _without_mask(node: fx.Node) -> None:
    node.kwargs = {name: value for name, value in node.kwargs.items() if name != "attn_mask"}


def _sharper(node: fx.Node) -> None:
    scale = node.kwargs["scale"]
    node.kwargs = {**node.kwargs, "scale": 2 * scale if isinstance(scale, int | float) else 2.0}


def _masks_of_other_windows(queries: Tensor, *rest: Any) -> Tensor:
    return ops.attention_mask(queries, *rest).roll(1, 0)


def _alike(tokens: Tensor, sizes: Tensor | None, matching: ops.Matching) -> Any:
    return ops.merge_tokens(tokens, None, matching)


def _without_sizes(sizes: Tensor, keys: Tensor, suffix: int = 0) -> Tensor:
    return torch.zeros_like(ops.size_bias(sizes, keys, suffix))


def _plain_mean(tokens: Tensor, axis: int, sizes: Tensor, keepdim: bool = False, **_: Any) -> Tensor:
    return tokens.mean(axis, keepdim=keepdim)


FAULTS = (
    GraphFault("a mirrored map", ops.resize_map, _calls(_mirrored)),
    GraphFault("the least significant positions are kept", ops.top_positions, _calls(_worst)),
    GraphFault("too few positions are kept", ops.top_positions, _calls(_fewer)),
    GraphFault("the least significant cells are fine", ops.choose_quads, _calls(_worst_quads)),
    GraphFault("tokens of other positions", ops.gather_tokens, _calls(_next_tokens)),
    GraphFault("entries of a table in another order", ops.gather_positions, _calls(_flipped_entries)),
    GraphFault("patches counted with the tokens before them", ops.kept_patches, _calls(_with_prefix)),
    GraphFault("an operator gets other positions", ops.gather_pixels, _calls(_other_pixels)),
    GraphFault("an operator is written to other positions", ops.write_pixels, _calls(_written_elsewhere)),
    GraphFault("dropped positions hold the other background", ops.write_pixels, _calls(_other_background)),
    GraphFault("windows taken for the order of the image", ops.moved_cells, _calls(_in_image_order)),
    GraphFault("rows from the second on", Kind.ROWS, _later_rows),
    GraphFault("other outputs of a layer", ops.linear_columns, _calls(_other_outputs)),
    GraphFault("other columns of its outputs", ops.split_columns, _calls(_other_columns)),
    GraphFault("patches of the mirrored image", ops.embed_patches, _calls(_mirrored_patches)),
    GraphFault("cells embedded at full size", ops.embed_quads, _calls(_fine_quads)),
    GraphFault("cells that are not halved", ops.halve_quads, _calls(_not_halved)),
    GraphFault("tokens of other cells", ops.join_quads, _calls(_other_quads)),
    GraphFault("entries of other cells", ops.add_quads, _calls(_tables_of_other_quads)),
    GraphFault("tokens put back in other places", ops.restore_places, _calls(_other_places)),
    GraphFault("dropped places filled by the first token", ops.fill_nearest, _calls(_filled_by_the_first)),
    GraphFault("attention without its mask", Kind.FUSED, _without_mask),
    GraphFault("attention of twice the scale", Kind.FUSED, _sharper),
    GraphFault("masks of other windows", ops.attention_mask, _calls(_masks_of_other_windows)),
    GraphFault("merged tokens that weigh alike", ops.merge_tokens, _calls(_alike)),
    GraphFault("attention that ignores how much was merged", ops.size_bias, _calls(_without_sizes)),
    GraphFault("means that ignore how much was merged", ops.mean_by_size, _calls(_plain_mean)),
)
