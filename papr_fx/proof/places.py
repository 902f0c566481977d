"""Outputs that hold a value per token: where the tokens are, and how to reorder them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import TokenRows, with_prefix
from ..tracing.numerics import tensors_of


class Place(NamedTuple):
    """Where one tensor of an output holds its tokens.

    Attributes:
        axis: Their axis; 0 is the batch.
        prefix: Tokens before the patches on that axis.
        axes: Number of axes that the patches have: one, or those of the grid, whose sizes are k, 1, ... for kept ones.
    """

    axis: int
    prefix: int
    axes: int


def find_place(dense: Sequence[int], pruned: Sequence[int], rows: TokenRows, kept: int) -> Place | None:
    """Finds the tokens of an output tensor by its shapes with all and with `kept` patches; None if these are equal.

    Raises:
        ValueError: The shapes differ in another way.
    """
    if tuple(dense) == tuple(pruned):
        return None
    grid, prefix = rows.grid, rows.prefix
    forms = (  # tokens before the patches, and the sizes of their axes: with all patches, with the kept ones
        (prefix, [rows.count], [prefix + kept]),
        (0, [rows.cells], [kept]),
        (0, [*grid], [kept, *[1] * (len(grid) - 1)]),
    )
    for axis, (first, before, after) in product(range(1, len(dense)), forms):
        end = axis + len(before)
        if [*dense[:axis], *after, *dense[end:]] == [*pruned] and [*dense[axis:end]] == before:
            return Place(axis, first, len(before))
    raise ValueError(f"an output {tuple(dense)} becomes {tuple(pruned)}")


def reorder(output: Any, places: Sequence[Place | None], cells: Tensor) -> list[Tensor]:
    """The tensors of an output, whose patches are picked by `cells` (B, k), counted in its order without prefix tokens."""
    return [_picked(tensor, place, cells) for tensor, place in zip(tensors_of(output), places, strict=True)]


def _picked(tensor: Tensor, place: Place | None, cells: Tensor) -> Tensor:
    if place is None:
        return tensor
    index = with_prefix(cells, place.prefix)
    rows = tensor.flatten(place.axis, place.axis + place.axes - 1)
    kept = torch.stack([sample.index_select(place.axis - 1, i) for sample, i in zip(rows, index, strict=True)])
    return kept.unflatten(place.axis, (-1, *[1] * (place.axes - 1))) if place.axes > 1 else kept
