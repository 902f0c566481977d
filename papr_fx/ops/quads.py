"""Quads of patches: choosing those that stay fine, and what each of the others stands for as one token.

A quad is a cell of 2 x 2 neighbouring patches, in each frame of a clip. Grids of odd sides have quads of two patches, or of
one, at their last row and column. Quads are numbered in row-major order. On a token axis their rows follow all others: row
N + q is quad q of N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .positions import ascending, keep_count, with_prefix, with_suffix

_SMALLEST = float("-inf")


class QuadCounts(NamedTuple):
    """How many quads keep their patches, and how many become one token each.

    Attributes:
        fine: Quads of four patches that stay four tokens.
        coarse: Quads that become one token.
    """

    fine: int
    coarse: int

    @property
    def tokens(self) -> int:
        """How many tokens they are."""
        return 4 * self.fine + self.coarse


def quad_grid(grid: Sequence[int]) -> tuple[int, ...]:
    """The grid of quads, (rows, columns) or (frames, rows, columns), of a grid of patches."""
    *frames, rows, columns = grid
    return (*frames, (rows + 1) // 2, (columns + 1) // 2)


def quad_counts(grid: Sequence[int], k: int) -> QuadCounts:
    """How many quads are fine and coarse, for k tokens at most.

    Every quad is a token first; what is left of k makes quads fine, for three more tokens each. Only quads of four patches can
    be, so that the number of tokens does not depend on which are chosen. With k below the number of quads, k are coarse.
    """
    *frames, rows, columns = grid
    whole, quads = prod([*frames, rows // 2, columns // 2]), prod(quad_grid(grid))
    # The sizes may be symbols: the plain functions would compare them, and so fix them.
    fine = cast(int, torch.sym_max(0, torch.sym_min(whole, (k - quads) // 3)))
    return QuadCounts(fine, cast(int, torch.sym_min(k, quads)) - fine)


def quad_members(grid: Sequence[int], like: Tensor) -> Tensor:
    """The patches of each quad, (quads, 4) int64 on the device of `like`. A smaller quad repeats its own, equally often."""
    *frames, rows, columns = grid
    firsts = [torch.arange((size + 1) // 2, device=like.device) * 2 for size in (rows, columns)]
    upper, left = (
        torch.stack([first, (first + 1).clamp(max=size - 1)], -1) for first, size in zip(firsts, (rows, columns), strict=True)
    )
    members = upper[:, None, :, None] * columns + left[None, :, None, :]  # (h', w', 2, 2)
    for count in frames:
        start = torch.arange(count, device=like.device) * (rows * columns)
        members = start.view(-1, 1, 1, 1, 1) + members
    return members.reshape(-1, 4)


def choose_quads(psm: Tensor, z: float, prefix: int = 0, suffix: int = 0) -> Tensor:
    """Rows of the tokens that a coarse background leaves: the patches of the best quads, and one token for each other quad.

    Ours, beyond the paper. With k as of `keep_count` and c quads, `(k - c) // 3` quads of four patches stay fine. With k < c
    the k best quads are coarse, and the others are dropped. The significance of a quad is the mean of its patches'.

    Args:
        psm: Significance of each position, (B, h, w) or (B, t, h, w).
        z: Keep ratio in (0, 1].
        prefix: Tokens before the grid. All are kept.
        suffix: Tokens behind the grid. All are kept.

    Returns:
        (B, prefix + K + suffix) int64, where K is at most k: 0..prefix-1, the fine patches in ascending order, the coarse quads
        in ascending order (row N + q is quad q of N tokens), then the last tokens.
    """
    grid = psm.shape[1:]
    scores = psm.flatten(1)  # (B, n)
    batch, count = scores.shape
    fine, coarse = quad_counts(grid, keep_count(count, z, prefix + suffix))
    members = quad_members(grid, psm)
    means = scores.index_select(1, members.flatten()).unflatten(1, (-1, 4)).mean(2)  # (B, c)
    whole = (members[:, 0] != members[:, 1]) & (members[:, 0] != members[:, 2])
    first = means.masked_fill(~whole, _SMALLEST).topk(fine, dim=1).indices  # (B, fine)
    patches = ascending(members.index_select(0, first.flatten()).view(batch, 4 * fine))
    others = ascending(means.scatter(1, first, _SMALLEST).topk(coarse, dim=1).indices)
    others = others + (count + suffix)  # behind the last tokens, once the prefix is added
    kept = torch.cat([patches, others], dim=1)
    kept = with_prefix(kept, prefix) if prefix else kept
    return with_suffix(kept, prefix + count, suffix) if suffix else kept


def halve_quads(images: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Images in which every patch holds its whole quad at half size: the mean of 2 x 2 pixels.

    Quads of two patches are halved along one axis, those of one patch stay.

    Args:
        images: (..., H, W).
        grid: Sizes of the grid of patches; the last two are rows and columns.
        patch: Rows and columns of pixels in a patch.

    Returns:
        Images of the same shape and dtype. Whole numbers are rounded.
    """
    floating = images.is_floating_point()
    halved = images if floating else images.float()
    for axis, count, size in zip((-2, -1), grid[-2:], patch, strict=True):
        one, other = _halved_lines(images, axis, count, size)
        halved = (halved.index_select(axis, one) + halved.index_select(axis, other)) / 2
    return halved if floating else halved.round().to(images.dtype)


def _halved_lines(images: Tensor, axis: int, count: int, size: int) -> tuple[Tensor, Tensor]:
    """For each line of pixels, the two whose mean it becomes."""
    length = images.shape[axis]
    lines = torch.arange(length, device=images.device)
    quad, inside = lines // (2 * size), lines % size
    halved = 2 * quad + 1 < count  # the quad has two patches along this axis
    one = torch.where(halved, (2 * size * quad + 2 * inside).clamp(max=length - 1), lines)  # a last patch may be padded
    return one, torch.where(halved, (one + 1).clamp(max=length - 1), lines)


def join_quads(tokens: Tensor, halved: Tensor, members: Tensor, prefix: int) -> Tensor:
    """Tokens (B, N, C), and behind them one for each quad, (B, N + c, C): the mean of its patches in `halved`.

    Args:
        tokens: Tokens of the images.
        halved: Tokens (B, N, C) of the images in which every patch holds its quad at half size.
        members: The patches of each quad, (c, 4).
        prefix: Tokens before the patches.
    """
    return torch.cat([tokens, _means(halved, members, 1, prefix)], dim=1)


def add_quads(value: Tensor, members: Tensor, axes: Sequence[int], rank: int, ends: tuple[int, int]) -> Tensor:
    """A table with an entry per position, and behind these one for each quad: the mean of its patches'.

    Args:
        value: The table. It broadcasts to `rank` axes, the batch first.
        members: The patches of each quad, (c, 4).
        axes: The axes that count positions.
        rank: Number of axes of the result.
        ends: How many tokens the axes count before the patches, and how many behind these they leave out. Zeros stand for
            those, so that quads have the same row in every table.

    Returns:
        The table with `rank` axes.
    """
    first, left_out = ends
    value = value.reshape((1,) * (rank - value.ndim) + tuple(value.shape))
    for axis in axes:
        sizes = [left_out if other == axis else size for other, size in enumerate(value.shape)]
        fill = [value.new_zeros(sizes)] if left_out else []
        value = torch.cat([value, *fill, _means(value, members, axis, first)], dim=axis)
    return value


def _means(value: Tensor, members: Tensor, axis: int, first: int) -> Tensor:
    """The means along an axis of the patches of each quad, where `first` other entries come before the patches."""
    rows = (members + first).flatten()
    return value.index_select(axis, rows).unflatten(axis, (-1, 4)).mean(axis + 1)


def token_places(cells: Tensor, grid: Sequence[int], suffix: int = 0) -> Tensor:
    """Which of the kept patches and quads stands for each position of a grid.

    Args:
        cells: What is kept, (B, k): positions of the grid, and n + suffix + q for quad q of n positions.
        grid: Sizes of the grid.
        suffix: Tokens behind the grid.

    Returns:
        (B, n) int64: the place in `cells` of what stands for the position, -1 where it was dropped.
    """
    count = prod(grid)
    itself = torch.arange(count, device=cells.device).unsqueeze(1).expand(count, 4)
    shares = torch.cat([itself, quad_members(grid, cells)])  # (n + c, 4)
    rows = torch.where(cells < count, cells, cells - suffix)
    stands = shares.index_select(0, rows.flatten()).view(len(cells), 4 * cells.shape[1])
    numbers = torch.arange(cells.shape[1], device=cells.device).repeat_interleave(4).expand_as(stands)
    places = torch.full((len(cells), count), -1, dtype=torch.int64, device=cells.device)
    return places.scatter(1, stands, numbers)
