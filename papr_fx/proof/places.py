"""Outputs that hold a value per token: where these stand, and the output with tokens in another order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..ops import TokenRows, with_prefix


class Place(NamedTuple):
    """Where tokens stand in one tensor of an output.

    Attributes:
        axis: Their axis; the batch is the first.
        prefix: Tokens before the patches along it.
        axes: How many axes the patches have: one, or those of the grid, which become k, 1, ... when some are kept.
    """

    axis: int
    prefix: int
    axes: int


def find_place(dense: Sequence[int], pruned: Sequence[int], rows: TokenRows, kept: int) -> Place | None:
    """Where the tokens stand in an output tensor: where its shape differs with `kept` patches; None if it does not.

    Raises:
        ValueError: The shapes differ in another way.
    """
    if tuple(dense) == tuple(pruned):
        return None
    grid, prefix = rows.grid, rows.prefix
    for axis in range(1, len(dense)):
        for place, before, after in (
            (Place(axis, prefix, 1), [rows.count], [prefix + kept]),
            (Place(axis, 0, 1), [rows.cells], [kept]),
            (Place(axis, 0, len(grid)), [*grid], [kept, *[1] * (len(grid) - 1)]),
        ):
            end = axis + len(before)
            if [*dense[:axis], *after, *dense[end:]] == [*pruned] and [*dense[axis:end]] == before:
                return place
    raise ValueError(f"an output {tuple(dense)} becomes {tuple(pruned)}")


def reorder(output: Any, places: Sequence[Place | None], cells: Tensor) -> Any:
    """An output with its patches gathered by `cells` (B, k)."""
    leaves, structure = pytree.tree_flatten(output)
    remaining = iter(places)
    return pytree.tree_unflatten(
        [_picked(leaf, next(remaining, None), cells) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure
    )


def _picked(tensor: Tensor, place: Place | None, cells: Tensor) -> Tensor:
    if place is None:
        return tensor
    index = with_prefix(cells, place.prefix)
    rows = tensor.flatten(place.axis, place.axis + place.axes - 1)
    kept = torch.stack([sample.index_select(place.axis - 1, i) for sample, i in zip(rows, index, strict=True)])
    return kept.unflatten(place.axis, (-1, *[1] * (place.axes - 1))) if place.axes > 1 else kept
