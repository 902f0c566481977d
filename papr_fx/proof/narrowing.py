"""Part 10, narrowing: rows that nobody reads may be left out."""

from __future__ import annotations

from typing import Any, cast

from torch import fx

from ..passes.kinds import Kind
from ..tracing.numerics import relative_error
from ..tracing.roles import find_all
from .case import Case, ComparisonError, PrecisionError


class NarrowingError(ComparisonError):
    """The graph that computes some rows only differs from the one that computes all. That one may still be right."""


def check(case: Case) -> None:
    """Keeps two thirds of the patches: the output must be that of the graph that computes all rows.

    Both graphs reduce tokens, if the plan does. With other rows in their place, results must differ.

    Fault: rows are read that were left out, or taken for others, as where one operand of an addition holds other rows than
    the other. The other parts do not find it: they are about the graph that computes all rows.
    Example: a residual addition that gets the rows from the second token on, beside the class token's branch: the output is
    off by 0.8.
    Does nothing where all rows are computed.

    Raises:
        NarrowingError: The results differ, or do not depend on the rows.
    """
    if not case.rewrite.narrows:
        return
    whole = case.rewrite.graph_on(narrow=False) if case.rewrite.mode.reduces else None
    expected = _run(case, whole) if whole else case.kept_output
    narrowed, other = case.rewrite.graph_on(narrow=True), case.rewrite.graph_on(narrow=True)
    for node in find_all(other, Kind.ROWS):
        value, axis, start, count = cast("tuple[fx.Node, int, int, int]", node.args)
        node.args = (value, axis, start + 1, count)
    try:
        error = relative_error(_run(case, narrowed), expected)
        control = relative_error(_run(case, other), expected)
    except PrecisionError as error:
        raise NarrowingError(f"narrowing: {error}. Pass narrow=False") from error
    if not error <= case.tolerance:
        raise NarrowingError(
            f"narrowing: with rows left out that nobody seems to read, the output is off by {error:.1e} (relative; "
            f"{case.tolerance:.0e} is allowed). Pass narrow=False"
        )
    if not control > max(case.tolerance / 10, 10 * error):
        raise NarrowingError(
            f"narrowing: with other rows in their place the output moves by only {control:.1e}, so the proof would not see a "
            "fault. Pass narrow=False"
        )


def _run(case: Case, graph: fx.Graph) -> Any:
    return case.run(fx.GraphModule(case.root, graph), case.images[:1], *case.indices(case.kept))
