"""Part 11, narrowing: rows and patches that nobody reads may be left out."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from ..ops import choose_quads
from ..passes.kinds import Kind
from ..tracing.numerics import relative_error
from ..tracing.roles import find_all
from ..tracing.sources import GraphModule
from .case import Case, ComparisonError, PrecisionError
from .coarse import COARSE_SHARE


class NarrowingError(ComparisonError):
    """The graph that leaves something out differs from the one that computes everything. That one may still be right."""


def check(case: Case) -> None:
    """Keeps two thirds of the patches: the output must be that of the graph that computes all rows and patches.

    With a coarse background some of what is kept is a quad.

    Both graphs reduce tokens, if the plan does. With other rows, or other patches, in their place results must differ.

    Fault: rows are read that were left out, or taken for others, as where one operand of an addition holds other rows than
    the other; or patches are embedded in another's place. The other parts do not find it: they are about the graph that
    computes everything.
    Example: a residual addition that gets the rows from the second token on, beside the class token's branch: the output is
    off by 0.8.
    Does nothing where everything is computed.

    Raises:
        NarrowingError: The results differ, or do not depend on the rows or patches.
    """
    if not case.rewrite.narrows:
        return
    kept, reduces = _kept(case), case.rewrite.mode.reduces
    whole = case.rewrite.graph_on(narrow=False, fuse=False) if reduces or case.rewrite.coarse else None
    expected = _run(case, whole, kept) if whole else case.kept_output
    try:
        error = relative_error(_run(case, case.rewrite.graph_on(fuse=False), kept), expected)
        controls = {what: relative_error(_run(case, graph, kept), expected) for what, graph in _others(case)}
    except PrecisionError as error:
        raise NarrowingError(f"narrowing: {error}. Pass narrow=False") from error
    if not error <= case.tolerance:
        raise NarrowingError(
            f"narrowing: with what nobody seems to read left out, the output is off by {error:.1e} (relative; "
            f"{case.tolerance:.0e} is allowed). Pass narrow=False"
        )
    for what, control in controls.items():
        if control <= max(case.tolerance / 10, 10 * error):  # no number moves as far as can be
            raise NarrowingError(
                f"narrowing: with other {what} in their place the output moves by only {control:.1e}, so the proof would not "
                "see a fault. Pass narrow=False"
            )


def _others(case: Case) -> Iterator[tuple[str, fx.Graph]]:
    """Graphs in which other rows are computed, or other patches embedded."""
    graph = case.rewrite.graph_on(fuse=False)
    rows = find_all(graph, Kind.ROWS)
    for node in rows:
        value, axis, start, count = cast("tuple[fx.Node, int, int, int]", node.args)
        node.args = (value, axis, start + 1, count)
    if rows:
        yield "rows", graph
    graph = case.rewrite.graph_on(fuse=False)
    embeddings = find_all(graph, Kind.EMBEDDING)
    for node in embeddings:
        images, patches, *rest = node.args
        with graph.inserting_before(node):
            moved = graph.create_node("call_function", operator.add, (patches, 1))
            others = graph.create_node("call_function", operator.mod, (moved, case.rewrite.choices[0].rows.cells))
        node.args = (images, others, *rest)
    if embeddings:
        yield "patches", graph


def _kept(case: Case) -> list[Tensor]:
    """What is kept of the first image: indices (1, prefix + k + suffix) for each choice."""
    if not case.rewrite.coarse:
        return case.indices(case.kept)
    rows = case.rewrite.choices[0].rows
    scores = torch.rand((1, *rows.grid), generator=case.random, device=case.random.device)
    return [choose_quads(scores, COARSE_SHARE, rows.prefix, rows.suffix)]


def _run(case: Case, graph: fx.Graph, kept: Sequence[Tensor]) -> Any:
    return case.run(GraphModule(case.root, graph), case.images[:1], *kept)
