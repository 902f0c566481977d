"""Putting tokens back in their places on the grid, and filling the places of those that were dropped."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from .positions import gather_positions


def map_places(patches: Tensor, grid: Sequence[int]) -> Tensor:
    """Which token stands for each place of a grid: (B, n) int64, -1 where it was dropped.

    Args:
        patches: The places of the k kept tokens, (B, k), counted in row-major order of the grid.
        grid: (rows, columns); (frames, rows, columns) for clips.
    """
    batch, kept = patches.shape
    tokens = torch.arange(kept, device=patches.device).expand(batch, kept)
    dropped = torch.full((batch, prod(grid)), -1, dtype=torch.int64, device=patches.device)
    return dropped.scatter(1, patches, tokens)


def fill_nearest(places: Tensor, grid: Sequence[int]) -> Tensor:
    """Gives each dropped place the token of the nearest place that has one: the least L2 distance on the grid, in cells.

    Of places that are equally near, the first in row-major order counts. Squared distances are sums over the axes, so the
    search runs axis by axis: n (h + w) comparisons, where each place against each token would be n k.

    Args:
        places: The token of each place, (B, n), -1 where there is none. At least one place of each sample has one.
        grid: The sizes of the grid, whose product is n.

    Returns:
        The token of each place, (B, n) int64, none of them -1.
    """
    count = prod(grid)
    cells = torch.arange(count, device=places.device)
    far = count * (1 + sum(side * side for side in grid))  # above every distance on the grid
    keys = torch.where(places >= 0, cells, far).view(places.shape[0], *grid)  # squared distance * n + cell
    for axis, side in enumerate(grid, 1):
        steps = torch.arange(side, device=places.device)
        squares = (steps.unsqueeze(1) - steps).square() * count  # (to, from)
        keys = (keys.unsqueeze(axis) + squares.view(side, side, *[1] * (len(grid) - axis))).amin(axis + 1)
    return places.gather(1, keys.flatten(1) % count)


def restore_places(value: Tensor, places: Tensor, axis: int, *, zero: bool = False, stacked: int = 1) -> Tensor:
    """Puts tokens in their places: k of them along `axis` become one per place.

    Args:
        value: Any value with one entry per token along `axis`, the batch first: (B, k, C), (B, C, k) and so on.
        places: The token of each place, (B, n).
        axis: The axis of the tokens.
        zero: Whether places may have no token (-1) and are zero then; otherwise each has one.
        stacked: How many values of the batch lie one after the other along the batch axis.

    Returns:
        The same with n entries along `axis`.
    """
    places = places.repeat(stacked, 1) if stacked > 1 else places
    if not zero:
        return gather_positions(value, places, [axis], value.ndim)
    restored = gather_positions(value, places.clamp(min=0), [axis], value.ndim)
    empty = (places < 0).view(places.shape[0], *[1] * (axis - 1), places.shape[1], *[1] * (value.ndim - axis - 1))
    return restored.masked_fill(empty, 0)
