"""Choosing positions, gathering them and writing them back."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_map(significance: Tensor, grid: Sequence[int]) -> Tensor:
    """Resizes saliency maps to a token grid (PaPr, Sec. 3.2): bicubic, trilinear for clips, with aligned corners.

    Args:
        significance: Maps (B, h, w); (B, t, h, w) for clips.
        grid: (rows, columns) of the target grid; (frames, rows, columns) for clips.

    Returns:
        The Patch Significance Map (B, *grid), float32 or the wider dtype of `significance`.
    """
    maps = significance.unsqueeze(1).to(torch.promote_types(significance.dtype, torch.float32))  # (B, 1, h, w)
    mode = "bicubic" if len(grid) == 2 else "trilinear"
    return F.interpolate(maps, size=tuple(grid), mode=mode, align_corners=True).squeeze(1)


def pool_map(significance: Tensor, grid: Sequence[int]) -> Tensor:
    """Averages maps as fine as their images or clips over the patches or tubelets of a token grid.

    Args:
        significance: Maps (B, H, W); (B, T, H, W) for clips.
        grid: (rows, columns) of the token grid; (frames, rows, columns) for clips.

    Returns:
        (B, *grid), float32 or the wider dtype of `significance`.
    """
    maps = significance.to(wide(significance))
    if any(size % count for size, count in zip(maps.shape[1:], grid, strict=True)):
        pool: Any = F.adaptive_avg_pool2d if len(grid) == 2 else F.adaptive_avg_pool3d
        return pool(maps.unsqueeze(1), tuple(grid)).squeeze(1)
    cells = maps
    for axis, count in reversed([*enumerate(grid, 1)]):
        cells = cells.unflatten(axis, (count, -1))
    return cells.mean([2 * axis for axis in range(1, len(grid) + 1)])  # the same, in operations that ONNX has


def keep_count(positions: int, z: float, others: int = 0) -> int:
    """How many positions of a grid are kept: floor(z * all tokens), at least 1 and at most the whole grid.

    z is the decimal that it is written as: 0.29 of 100 is 29, where the product of floats is below it.

    Args:
        positions: Positions of the grid.
        z: Keep ratio in (0, 1].
        others: Tokens before the grid and behind it. They count towards the total and are always kept.
    """
    numerator, denominator = _as_fraction(z)
    return min(positions, max(1, (positions + others) * numerator // denominator))


@torch.compiler.assume_constant_result
def _as_fraction(z: float) -> tuple[int, int]:
    """The decimal that z is written as: integers, so that a symbolic number of positions stays symbolic."""
    share = Fraction(repr(float(z)))
    return share.numerator, share.denominator


def top_positions(psm: Tensor, z: float, prefix: int = 0, suffix: int = 0) -> Tensor:
    """Indices of the most significant positions (PaPr, Eq. 3), between those of the prefix and suffix tokens.

    Args:
        psm: Significance of each position, (B, h, w) or (B, t, h, w).
        z: Keep ratio in (0, 1].
        prefix: Tokens before the grid. All are kept.
        suffix: Tokens behind the grid. All are kept.

    Returns:
        (B, prefix + k + suffix) int64: 0..prefix-1, the k kept positions in ascending order, then the last indices. `topk`
        alone gives them in an order that differs between eager and compiled code.
    """
    scores = psm.flatten(1)  # (B, n)
    k = keep_count(scores.shape[1], z, prefix + suffix)
    kept = ascending(scores.topk(k, dim=1, sorted=False).indices)  # (B, k)
    kept = with_prefix(kept, prefix) if prefix else kept
    return with_suffix(kept, prefix + scores.shape[1], suffix) if suffix else kept


def ascending(indices: Tensor) -> Tensor:
    """Indices (B, k) in ascending order.

    By `topk`, which is a library's call on every device. For `sort` inductor writes a Triton kernel, which takes minutes to
    compile.
    """
    return indices.topk(indices.shape[1], dim=1, largest=False).values


def count_windows(size: int, offset: int, step: int) -> int:
    """Number of windows that `unfold` takes along an axis of `size`: `(size + offset) // step + 1`."""
    return (size + offset) // step + 1


def gather_tokens(tokens: Tensor, keep: Tensor) -> Tensor:
    """Gathers tokens by index, per sample: (B, N, C) and (B, K) become (B, K, C).

    One `index_select` over all rows costs little more than a copy. `gather` would need the index expanded to C columns.
    """
    batch, count, width = tokens.shape
    rows = tokens.reshape(batch * count, width).index_select(0, flat_rows(keep, count))
    return rows.reshape(batch, keep.shape[1], width)  # not -1, which an empty batch leaves open


def kept_patches(keep: Tensor, prefix: int, suffix: int = 0) -> Tensor:
    """The kept patches (B, k) of kept tokens (B, prefix + k + suffix), numbered from the first patch on."""
    return keep[:, prefix : keep.shape[1] - suffix] - prefix


def gather_positions(value: Tensor, keep: Tensor, axes: Sequence[int], rank: int) -> Tensor:
    """Gathers the kept entries of a table that holds one entry per position, or per pair of positions.

    A rotary table (N, D) for queries (B, H, K, D) becomes (B, 1, K, D), with axes=[2] and rank=4. A relative-position bias
    (1, H, N, N) becomes (B, H, K, K), with axes=[2, 3].

    Args:
        value: The table. It broadcasts to `rank` axes, the batch first.
        keep: Kept positions (B, K).
        axes: The axes that count positions: one or two, never the batch.
        rank: Number of axes of the result.

    Returns:
        A tensor of `rank` axes: B first, K along each of `axes`.
    """
    value = value.reshape((1,) * (rank - value.ndim) + tuple(value.shape))
    rows = value.movedim([0, *axes], list(range(len(axes) + 1)))  # (1 or B, N, ..., the rest)
    count, rest = rows.shape[1], rows.shape[len(axes) + 1 :]
    index = keep if len(axes) == 1 else keep.unsqueeze(2) * count + keep.unsqueeze(1)  # (B, K) or (B, K, K)
    first_row = torch.arange(rows.shape[0], device=keep.device) * count ** len(axes)
    index = index + first_row.view(-1, *[1] * len(axes))
    kept = rows.reshape(-1, *rest).index_select(0, index.reshape(-1)).view(*index.shape, *rest)
    return kept.movedim(list(range(len(axes) + 1)), [0, *axes])


def with_prefix(keep: Tensor, prefix: int) -> Tensor:
    """Kept positions (B, k) of a grid as kept tokens (B, prefix + k): the prefix tokens come first."""
    first = torch.arange(prefix, device=keep.device).expand(keep.shape[0], prefix)
    return torch.cat([first, keep + prefix], dim=1)


def with_suffix(keep: Tensor, count: int, suffix: int) -> Tensor:
    """Kept tokens (B, K) of the first `count`, and the `suffix` tokens behind those, (B, K + suffix)."""
    last = torch.arange(count, count + suffix, device=keep.device).expand(keep.shape[0], suffix)
    return torch.cat([keep, last], dim=1)


def pixel_rows(keep: Tensor, grid: Sequence[int]) -> Tensor:
    """Kept positions (B, k) of a grid as rows (B * k,) of all positions of the batch, B * h * w or B * t * h * w."""
    return flat_rows(keep, prod(grid))


def flat_rows(index: Tensor, count: int) -> Tensor:
    """Indices (B, k) into the `count` rows of each sample, as rows (B * k,) of the whole batch."""
    first_row = torch.arange(index.shape[0], device=index.device).unsqueeze(1) * count  # (B, 1)
    return (index + first_row).reshape(-1)


def number_cells(keep: Tensor, grid: Sequence[int], layout: str) -> Tensor:
    """Numbers the cells of a grid, on the device of `keep`: (1, 1, h, w) for the layout BCHW, (1, h, w, 1) for BHWC."""
    cells = torch.arange(grid[0] * grid[1], device=keep.device).view(1, 1, grid[0], grid[1])
    return cells.movedim(1, layout.index("C"))


def moved_cells(keep: Tensor, cells: Tensor) -> Tensor:
    """The places of kept cells (B, k) in `cells`, a permutation of all cells of the grid."""
    cells = cells.flatten()  # (n,)
    places = torch.empty_like(cells).index_copy(0, cells, torch.arange(cells.shape[0], device=cells.device))
    return places[keep]


def gather_pixels(x: Tensor, rows: Tensor, grid: Sequence[int], layout: str) -> Tensor:
    """Gathers kept positions: (B, C, h, w), (B, h, w, C) or (B, h * w, C) become (B, C, k, 1), (B, k, 1, C) or (B, k, C).

    Args:
        x: Values of every position.
        rows: Flat indices (B * k,), see `pixel_rows`.
        grid: The sizes that `rows` was made for, or their product where `x` holds windows.
        layout: Axes of `x`: BCHW, BHWC, BNC or BCN; BCTHW or BTHWC for clips, whose grid becomes k x 1 x 1.

    Raises:
        ValueError: The positions of `x` are not those of `grid`.
    """
    channels = layout.index("C")
    spatial = [x.shape[axis] for axis in range(1, x.ndim) if axis != channels]
    if spatial != list(grid) and (prod(spatial) != prod(grid) or len(spatial) == len(grid)):
        raise ValueError(f"positions were chosen for a grid of {tuple(grid)}, but the value has {spatial}")
    kept = _as_rows(x, channels).index_select(0, rows)  # (B * k, C)
    count = rows.shape[0] // x.shape[0] if x.shape[0] else 1  # of an empty batch any count: no value has it
    return kept.view(x.shape[0], count, *[1] * (x.ndim - 3), kept.shape[1]).movedim(-1, channels)


def write_pixels(residual: Tensor, branch: Tensor, rows: Tensor, layout: str, background: str) -> Tensor:
    """Adds a branch that was computed for kept positions to its residual (PaPr, Eq. 4).

    Args:
        residual: (B, C, h, w), (B, h, w, C), (B, h * w, C) or (B, C, h * w), or with a grid (t, h, w).
        branch: The same with k positions, as a grid k x 1.
        rows: Flat indices (B * k,), see `pixel_rows`.
        layout: Axes of both: BCHW, BHWC, BNC, BCN, BCTHW or BTHWC.
        background: What dropped positions hold: the residual ("keep"), or zeros ("zero").

    Returns:
        A tensor of the residual's shape.
    """
    channels = layout.index("C")
    dense, kept = _as_rows(residual, channels), _as_rows(branch, channels)  # (B * h * w, C), (B * k, C)
    dtype = torch.promote_types(dense.dtype, kept.dtype)
    if torch.compiler.is_compiling() and rows.is_cuda and not torch.is_grad_enabled():
        out = _looked_up(dense.to(dtype), kept.to(dtype), rows, background)
    elif background == "keep":
        out = dense.to(dtype).index_add(0, rows, kept.to(dtype))
    else:
        out = torch.zeros_like(dense, dtype=dtype).index_copy(0, rows, dense.index_select(0, rows) + kept)
    return out.view(residual.movedim(channels, -1).shape).movedim(-1, channels)


def _looked_up(dense: Tensor, kept: Tensor, rows: Tensor, background: str) -> Tensor:
    """Lets every position look up its branch: one CUDA kernel, where a scatter takes several, or a library call in bfloat16.

    Not for training: all dropped positions would add their zero gradients to the same row.
    """
    numbers = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
    places = torch.full_like(dense[:, 0], -1, dtype=torch.int32).index_copy(0, rows, numbers)  # (B * h * w,)
    added = dense + kept.index_select(0, places.clamp(min=0))
    return torch.where(places.unsqueeze(1) >= 0, added, dense if background == "keep" else 0)


def mask_positions(x: Tensor, mask: Tensor, layout: str, grid: Sequence[int]) -> Tensor:
    """Multiplies every position of `x` by its entry of `mask`, (B, h * w)."""
    sizes = {"B": mask.shape[0], "C": 1, "N": mask.shape[1]} | dict(zip("THW"[-len(grid) :], grid, strict=True))
    return x * mask.view([sizes[letter] for letter in layout])


def _as_rows(x: Tensor, channels: int) -> Tensor:
    """The channels of every position as one row: a view of channels-last memory, otherwise a copy."""
    last = x.movedim(channels, -1)
    return last.reshape(-1, last.shape[-1])


def wide(tensor: Tensor) -> torch.dtype:
    """float32, or the tensor's own dtype if that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)
