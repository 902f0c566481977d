"""Outputs that hold a value per token: where the tokens are, and how to reorder them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import TokenRows, with_prefix, with_suffix
from ..tracing.numerics import tensors_of


class Place(NamedTuple):
    """Where one tensor of an output holds its tokens.

    Attributes:
        axis: Their axis; 0 is the batch.
        rows: The patches, and the tokens before and behind them on that axis.
        axes: Number of axes that the patches have: one, or those of the grid, whose sizes are k, 1, ... for kept ones.
    """

    axis: int
    rows: TokenRows
    axes: int


def find_place(dense: Sequence[int], pruned: Sequence[int], rows: TokenRows, kept: int) -> Place | None:
    """Finds the tokens of an output tensor by its shapes with all and with `kept` patches; None if these are equal.

    Raises:
        ValueError: The shapes differ in another way.
    """
    if tuple(dense) == tuple(pruned):
        return None
    grid = rows.grid
    # The rows of the axis, and the sizes of their axes: with all patches, with the kept ones.
    parts = [TokenRows(grid, rows.prefix - span.first, rows.suffix - span.behind) for span in rows.spans]
    forms = [(part, [part.count], [part.others + kept]) for part in parts]
    forms.append((TokenRows(grid), [*grid], [kept, *[1] * (len(grid) - 1)]))
    for axis, (part, before, after) in product(range(1, len(dense)), forms):
        end = axis + len(before)
        if [*dense[:axis], *after, *dense[end:]] == [*pruned] and [*dense[axis:end]] == before:
            return Place(axis, part, len(before))
    raise ValueError(f"an output {tuple(dense)} becomes {tuple(pruned)}")


def reorder(output: Any, places: Sequence[Place | None], cells: Tensor) -> list[Tensor]:
    """The tensors of an output, whose patches are picked by `cells` (B, k), counted in its order without other tokens."""
    return [_picked(tensor, place, cells) for tensor, place in zip(tensors_of(output), places, strict=True)]


def _picked(tensor: Tensor, place: Place | None, cells: Tensor) -> Tensor:
    if place is None:
        return tensor
    rows = tensor.flatten(place.axis, place.axis + place.axes - 1)
    count = rows.shape[place.axis] - place.rows.suffix
    index = with_suffix(with_prefix(cells, place.rows.prefix), count, place.rows.suffix)
    kept = torch.stack([sample.index_select(place.axis - 1, i) for sample, i in zip(rows, index, strict=True)])
    return kept.unflatten(place.axis, (-1, *[1] * (place.axes - 1))) if place.axes > 1 else kept
