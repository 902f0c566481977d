"""Part 11, narrowing: rows and patches that nobody reads may be left out."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, cast

from torch import fx

from ..passes.kinds import Kind
from ..tracing.numerics import relative_error
from ..tracing.roles import find_all
from .case import Case, ComparisonError, PrecisionError


class NarrowingError(ComparisonError):
    """The graph that leaves something out differs from the one that computes everything. That one may still be right."""


def check(case: Case) -> None:
    """Keeps two thirds of the patches: the output must be that of the graph that computes all rows and patches.

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
    whole = case.rewrite.graph_on(narrow=False, fuse=False) if case.rewrite.mode.reduces else None
    expected = _run(case, whole) if whole else case.kept_output
    try:
        error = relative_error(_run(case, case.rewrite.graph_on(fuse=False)), expected)
        controls = {what: relative_error(_run(case, graph), expected) for what, graph in _others(case)}
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
        images, patches, conv = node.args
        with graph.inserting_before(node):
            moved = graph.create_node("call_function", operator.add, (patches, 1))
            others = graph.create_node("call_function", operator.mod, (moved, case.rewrite.choices[0].rows.cells))
        node.args = (images, others, conv)
    if embeddings:
        yield "patches", graph


def _run(case: Case, graph: fx.Graph) -> Any:
    return case.run(fx.GraphModule(case.root, graph), case.images[:1], *case.indices(case.kept))
