"""Part 7, regions: a pixel operator computes for kept positions what it computes for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, fx

from ..dataflow.moves import copy_moves
from ..errors import VerifyError
from ..ops.positions import mask_positions
from ..passes.kinds import Kind
from ..passes.prune_pixels import PixelSite
from ..planning.modes import PixelPlan, Refused
from ..tracing.graphs import nodes_by_name, shape_of
from ..tracing.numerics import relative_error
from ..tracing.roles import find
from ..tracing.sources import GraphModule
from .case import Case, ComparisonError
from .rewrite import Rewrite


def check(case: Case) -> None:
    """Compares pixel operators on each half of the positions with the dense graph whose branches are masked (PaPr, Eq. 4).

    Fault: an operator mixes positions, such as a norm over space, or writes to the wrong ones. The other parts do not find
    it: with all positions kept, in any order, such a norm computes the same numbers.
    Example: a branch that starts with GroupNorm: the output is off by 0.005, with all positions kept by 2e-16.
    Does nothing for tokens, which attention mixes (see `hidden_keys`).

    Raises:
        ComparisonError: They differ by more than one wrong position causes.
        VerifyError: Dropped positions hold something else than was asked for.
    """
    if case.rewrite.prunes_tokens:
        return
    for training in (False, *([] if isinstance(case.rewrite.plan.train, Refused) else [True])):
        _check_backgrounds(replace(case.rewrite, training=training))
    found = error(case, case.halves, case.halves, case.image_twice)
    if not found <= case.allowed:
        raise ComparisonError(
            f"regions: with fewer positions the output is off by {found:.1e} from the dense model with masked branches "
            f"({case.allowed:.0e} is allowed): an operator mixes positions"
        )


def _check_backgrounds(rewrite: Rewrite) -> None:
    """Compares what dropped positions of each operator hold with what was asked for (PaPr, Eq. 4; "auto" in `transform`)."""
    graph = rewrite.pruned_graph()
    for number, site in enumerate(rewrite.pixel_sites):
        found, wanted = find(graph, Kind.WRITTEN, number).args[-1], _background(rewrite, site)
        if found != wanted:
            raise VerifyError(
                f"regions: what `{site.addition}` drops is to be {wanted!r} in {rewrite.name}, and is {found!r} in the graph"
            )


def _background(rewrite: Rewrite, site: PixelSite) -> str:
    """What dropped positions of an operator hold: what was asked for, or zeros behind a depthwise convolution in eval mode."""
    assert isinstance(rewrite.mode, PixelPlan)
    if rewrite.mode.background in ("keep", "zero"):
        return rewrite.mode.background
    return "keep" if rewrite.training or not site.convolution else "zero"


def error(case: Case, kept: Sequence[Tensor], unmasked: Sequence[Tensor], images: Tensor | None = None) -> float:
    """The relative error of the output on `kept` cells, where the dense graph's branches are masked but for some cells.

    Args:
        case: The case of a pixel model.
        kept: Cells (b, k) of each grid that the rewritten graph keeps.
        unmasked: Cells of each grid where the masks are one: `kept`, or others as a negative control.
        images: One for each row of cells; None for the first ones of the case.
    """
    masks = [
        case.images.new_zeros(len(cells), choice.rows.cells).scatter_(1, cells, 1)
        for cells, choice in zip(unmasked, case.rewrite.choices, strict=True)
    ]
    images = case.images[: len(kept[0])] if images is None else images
    masked = case.run(GraphModule(case.root, mask_branches(case)), images, *masks)
    return relative_error(case.run_pruned(kept, images), masked)


def mask_branches(case: Case) -> fx.Graph:
    """The dense graph, in which the branch of each pixel operator is multiplied by a mask (B, h * w) of its grid.

    The masks are further inputs, one per grid in order. Where the background is zero, they multiply the residual too.
    """
    graph = case.rewrite.dense_graph()
    nodes = nodes_by_name(graph)
    masks: dict[tuple[int, ...], fx.Node] = {}
    last = graph.find_nodes(op="placeholder")[0]
    for choice in case.rewrite.choices:
        with graph.inserting_after(last):
            masks[choice.rows.grid] = last = graph.placeholder(f"mask_{choice.number}")
    for site in case.rewrite.pixel_sites:
        mask, sizes = _mask_of(graph, nodes, site, masks[site.rows.grid])
        zeroed = [site.branch, site.residual] if _background(case.rewrite, site) == "zero" else [site.branch]
        pairs = [(nodes[site.addition], nodes[name], site.layout) for name in zeroed]
        pairs += [(nodes[name], nodes[name].all_input_nodes[0], layout) for name, layout in site.masked]
        for user, source, layout in pairs:
            with graph.inserting_before(user):
                user.replace_input_with(source, graph.call_function(mask_positions, (source, mask, layout, sizes)))
    return graph


def _mask_of(graph: fx.Graph, nodes: dict[str, fx.Node], site: PixelSite, mask: fx.Node) -> tuple[fx.Node, Any]:
    """The mask of a grid in the order of a site's values, and the sizes that these have."""
    sizes = site.rows.grid
    if site.placing.moves:
        path = [nodes[step] for step in site.placing.moves.path]
        shape = (1, *sizes) if site.placing.moves.layout == "BCHW" else (*sizes, 1)
        with graph.inserting_before(path[-1].next):
            cells = graph.call_method("view", (mask, -1, *shape))
            moved = copy_moves(graph, nodes[site.placing.moves.origin], path, cells)[-1]
            mask = graph.call_method("flatten", (moved, 1))
        windows = cast("tuple[int, ...]", shape_of(path[-1]))
        sizes = tuple(windows[site.layout.index(axis)] for axis in "HW")
    if site.rows.others:
        with graph.inserting_before(nodes[site.addition]):
            mask = graph.call_function(F.pad, (mask, (site.rows.prefix, site.rows.suffix)), {"value": 1.0})
    return mask, sizes
