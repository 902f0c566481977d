"""Part 15, sizes: what holds for the traced image size holds for another one."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from math import ceil, floor, prod

import torch
from torch import Tensor

from ..errors import VerifyError
from ..ops import TokenRows
from ..planning.modes import Choice
from ..tracing.graphs import cut, nodes_by_name
from ..tracing.numerics import relative_error, tensors_of
from . import choice
from .case import Case, ComparisonError
from .rewrite import Stream


class SizesError(ComparisonError):
    """On images of another size the graph differs from the model. It may still be right for those of the traced size."""


def check(case: Case) -> None:
    """Runs the graph on one image of another size: with all positions kept the output must be the model's.

    Its grid must be that of the dense graph at this size, and it must keep what its map says there (see `choice`).

    Fault: rows and columns of the grid exchanged, or a size of the traced images that stayed in the graph. The other parts do
    not find it: they use the traced size.
    Example: a grid that is read as (columns, rows): on images of 8 x 24 it is (8, 4) in place of (4, 8).
    Does nothing for a model that takes one size.

    Raises:
        SizesError: Another grid, another choice or another output.
    """
    if not case.rewrite.plan.target.sizes:
        return
    shape = min(case.rewrite.plan.target.sizes, key=prod)
    images = torch.randn(shape, generator=case.random, device=case.images.device, dtype=case.images.dtype)
    graph = case.rewrite.dense_graph()
    nodes, streams = nodes_by_name(graph), list(case.rewrite.streams)
    values = tensors_of(case.run(cut(case.root, graph, *(nodes[stream.node] for stream in streams)), images))
    grids = {s.rows.grid: _grid(case, s, value.shape, shape) for s, value in zip(streams, values, strict=True)}
    indices = [_all_rows(c, grids[c.rows.grid], images.device) for c in case.rewrite.choices]
    try:
        error = relative_error(case.run(case.pruned, images, *indices), case.run(case.model, images))
        if not error <= case.tolerance:
            raise ComparisonError(
                f"with all positions kept, the output is off by {error:.1e} (relative; {case.tolerance:.0e} is allowed)"
            )
        choice.compare(case, images, grids)
    except VerifyError as error:  # also that the graph does not run there
        raise SizesError(f"sizes: on images {tuple(shape)}, {error}") from error


def _grid(case: Case, stream: Stream, value: Sequence[int], images: Sequence[int]) -> tuple[int, ...]:
    """The grid of a stream whose value has this shape on images of that one.

    Positions in one axis are laid out as many to a side as the side is long, rounded up or down. Where that leaves no grid of
    as many positions, or several, they are one row.
    """
    layout, rows = case.rewrite.image_layout, stream.rows
    if "H" in stream.layout:
        return tuple(value[stream.layout.index(letter)] for letter in "THW" if letter in stream.layout)
    axes = [layout.index(letter) for letter in "THW" if letter in layout]
    exact = [Fraction(images[axis] * count, case.images.shape[axis]) for axis, count in zip(axes, rows.grid, strict=True)]
    positions = value[stream.layout.index("N")] - rows.others
    found = {grid for grid in product(*({floor(side), ceil(side)} for side in exact)) if prod(grid) == positions}
    return found.pop() if len(found) == 1 else (positions,)


def _all_rows(choice: Choice, grid: tuple[int, ...], device: torch.device) -> Tensor:
    """All rows of a grid, (1, N), other tokens included."""
    rows = TokenRows(grid, choice.rows.prefix, choice.rows.suffix)
    return rows.index(torch.arange(rows.cells, device=device).unsqueeze(0))
