"""The functions that a rewritten graph calls: each is one node there.

None of them reads a tensor's content on the host, and every count is a Python integer, so that CUDA graphs stay whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_map(significance: Tensor, grid: Sequence[int]) -> Tensor:
    """Resizes significance maps to a token grid (PaPr, Sec. 3.2): bicubic, or trilinear for clips, with aligned corners.

    Args:
        significance: Maps (B, h, w), or of clips (B, t, h, w).
        grid: Rows and columns of the target grid, of clips (frames, rows, columns).

    Returns:
        The Patch Significance Map (B, *grid), float32 or the wider dtype of `significance`.
    """
    maps = significance.unsqueeze(1).to(torch.promote_types(significance.dtype, torch.float32))  # (B, 1, h, w)
    mode = "bicubic" if len(grid) == 2 else "trilinear"
    return F.interpolate(maps, size=tuple(grid), mode=mode, align_corners=True).squeeze(1)


def keep_count(positions: int, z: float, prefix: int = 0) -> int:
    """Number of positions kept of a grid: `int(z * all tokens)`, at least 1 and at most all of the grid.

    Args:
        positions: Positions of the grid.
        z: Keep ratio in (0, 1].
        prefix: Tokens beside the grid that count towards the total and are kept anyway.
    """
    return min(positions, max(1, int((positions + prefix) * z)))


def top_positions(psm: Tensor, z: float, prefix: int = 0) -> Tensor:
    """Indices of the most significant positions (PaPr, Eq. 3), behind those of the prefix tokens.

    Args:
        psm: Significance of each position, (B, h, w) or (B, t, h, w).
        z: Keep ratio in (0, 1].
        prefix: Tokens in front of the grid, all kept.

    Returns:
        (B, prefix + k) int64: 0..prefix-1, then the k kept positions in no particular order.
    """
    scores = psm.flatten(1)  # (B, n)
    k = keep_count(scores.shape[1], z, prefix)
    kept = scores.topk(k, dim=1, sorted=False).indices  # (B, k)
    return with_prefix(kept, prefix) if prefix else kept


def count_windows(size: int, offset: int, step: int) -> int:
    """Number of windows that an unfolding takes along an axis of `size`: `(size + offset) // step + 1`."""
    return (size + offset) // step + 1


def gather_tokens(tokens: Tensor, keep: Tensor) -> Tensor:
    """Picks tokens by index for each sample: (B, N, C) and (B, K) become (B, K, C).

    One `index_select` over all rows costs little more than a copy; `gather` would need the index expanded to C columns.
    """
    batch, count, width = tokens.shape
    first_row = torch.arange(batch, device=keep.device).unsqueeze(1) * count  # (B, 1)
    rows = tokens.reshape(batch * count, width).index_select(0, (keep + first_row).reshape(-1))
    return rows.reshape(batch, -1, width)


def kept_patches(keep: Tensor, prefix: int) -> Tensor:
    """The kept patches (B, k), counted without the prefix tokens, of kept tokens (B, prefix + k)."""
    return keep[:, prefix:] - prefix


def gather_positions(value: Tensor, keep: Tensor, axes: Sequence[int], rank: int) -> Tensor:
    """Picks, for each sample, the kept positions of a value that holds something for every position, or pair of positions.

    A rotary table (N, D) that meets queries (B, H, K, D) becomes (B, 1, K, D), with axes=[2] and rank=4; a relative-position
    bias (1, H, N, N) becomes (B, H, K, K), with axes=[2, 3].

    Args:
        value: Broadcastable to `rank` axes, of which the first is the batch.
        keep: Kept positions (B, K).
        axes: Where positions are counted, one or two of the axes behind the batch.
        rank: Number of axes of the result.

    Returns:
        `rank` axes, B first, K along each of `axes`.
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
    """Kept positions (B, k) of a grid as kept tokens (B, prefix + k), those of the prefix first."""
    first = torch.arange(prefix, device=keep.device).expand(keep.shape[0], prefix)
    return torch.cat([first, keep + prefix], dim=1)


def pixel_rows(keep: Tensor, grid: Sequence[int]) -> Tensor:
    """Kept positions (B, k) of a grid as rows (B * k,) of the batch's B * h * w (* t) positions."""
    count = prod(grid)
    first_row = torch.arange(keep.shape[0], device=keep.device).unsqueeze(1) * count  # (B, 1)
    return (keep + first_row).reshape(-1)


def number_cells(keep: Tensor, grid: Sequence[int], layout: str) -> Tensor:
    """The numbers of a grid's cells on the device of `keep`: (1, 1, h, w) for the layout BCHW, (1, h, w, 1) for BHWC."""
    cells = torch.arange(grid[0] * grid[1], device=keep.device).view(1, 1, grid[0], grid[1])
    return cells.movedim(1, layout.index("C"))


def moved_cells(keep: Tensor, cells: Tensor) -> Tensor:
    """Where kept cells (B, k) are among positions that hold `cells`, all cells of the grid in another order."""
    cells = cells.flatten()  # (n,)
    places = torch.empty_like(cells).index_copy(0, cells, torch.arange(cells.shape[0], device=cells.device))
    return places[keep]


def gather_pixels(x: Tensor, rows: Tensor, grid: Sequence[int], layout: str) -> Tensor:
    """Picks kept positions: (B, C, h, w), (B, h, w, C) or (B, h * w, C) become (B, C, k, 1), (B, k, 1, C) or (B, k, C).

    Args:
        x: Values of every position.
        rows: Flat indices (B * k,), see `pixel_rows`.
        grid: Sizes that `rows` was made for, or their product where rows of `x` are windows.
        layout: Axes of `x`: BCHW, BHWC, BNC or BCN; of clips, whose grid becomes k x 1 x 1, BCTHW or BTHWC.

    Raises:
        ValueError: The positions of `x` are not those of `grid`.
    """
    channels = layout.index("C")
    spatial = [x.shape[axis] for axis in range(1, x.ndim) if axis != channels]
    if spatial != list(grid) and (prod(spatial) != prod(grid) or len(spatial) == len(grid)):
        raise ValueError(f"positions were chosen for a grid of {tuple(grid)}, but the value has {spatial}")
    kept = _as_rows(x, channels).index_select(0, rows)  # (B * k, C)
    return kept.view(x.shape[0], -1, *[1] * (x.ndim - 3), kept.shape[1]).movedim(-1, channels)


def write_pixels(residual: Tensor, branch: Tensor, rows: Tensor, layout: str, background: str) -> Tensor:
    """Adds a branch computed for kept positions to its residual (PaPr, Eq. 4): zero-padded, the branch has the residual's size.

    Args:
        residual: (B, C, h, w), (B, h, w, C), (B, h * w, C) or (B, C, h * w), or with a grid (t, h, w).
        branch: The same with k positions (k x 1 of a grid).
        rows: Flat indices (B * k,), see `pixel_rows`.
        layout: Axes of both: BCHW, BHWC, BNC, BCN, BCTHW or BTHWC.
        background: At dropped positions, "keep" leaves the residual, "zero" leaves nothing.

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
    """Has every position look up its branch: one CUDA kernel, where a scatter takes several, or a library call in bfloat16.

    Not for gradients: all dropped positions would add theirs, of zero, to one row.
    """
    numbers = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
    places = torch.full_like(dense[:, 0], -1, dtype=torch.int32).index_copy(0, rows, numbers)  # (B * h * w,)
    added = dense + kept.index_select(0, places.clamp(min=0))
    return torch.where(places.unsqueeze(1) >= 0, added, dense if background == "keep" else 0)


def mask_positions(x: Tensor, mask: Tensor, layout: str, grid: Sequence[int]) -> Tensor:
    """Multiplies every position of `x` by its entry in `mask`, (B, h * w)."""
    sizes = {"B": mask.shape[0], "C": 1, "N": mask.shape[1]} | dict(zip("THW"[-len(grid) :], grid, strict=True))
    return x * mask.view([sizes[letter] for letter in layout])


def _as_rows(x: Tensor, channels: int) -> Tensor:
    """The channels of every position as one row: a view of channels-last memory, else a copy."""
    last = x.movedim(channels, -1)
    return last.reshape(-1, last.shape[-1])
