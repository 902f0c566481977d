"""The functions that a rewritten graph calls: each is one node there.

None of them reads a tensor's content on the host, and every count is a Python integer, so that CUDA graphs stay whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_map(significance: Tensor, grid: Sequence[int]) -> Tensor:
    """Resizes significance maps (B, h, w) to a token grid (PaPr, Sec. 3.2), bicubic with aligned corners.

    Args:
        significance: Maps (B, h, w).
        grid: Rows and columns of the target grid.

    Returns:
        The Patch Significance Map (B, *grid), float32 or the wider dtype of `significance`.
    """
    maps = significance.unsqueeze(1).to(torch.promote_types(significance.dtype, torch.float32))  # (B, 1, h, w)
    return F.interpolate(maps, size=tuple(grid), mode="bicubic", align_corners=True).squeeze(1)


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
        psm: Significance of each position, (B, h, w).
        z: Keep ratio in (0, 1].
        prefix: Tokens in front of the grid, all kept.

    Returns:
        (B, prefix + k) int64: 0..prefix-1, then the k kept positions in no particular order.
    """
    scores = psm.flatten(1)  # (B, n)
    k = keep_count(scores.shape[1], z, prefix)
    kept = scores.topk(k, dim=1, sorted=False).indices  # (B, k)
    if not prefix:
        return kept
    first = torch.arange(prefix, device=kept.device).expand(kept.shape[0], prefix)
    return torch.cat([first, kept + prefix], dim=1)


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
