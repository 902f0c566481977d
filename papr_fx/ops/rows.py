"""The rows of a token axis: prefix tokens, then one row per position of a grid."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .positions import keep_count, kept_patches, with_prefix


@dataclass(frozen=True)
class TokenRows:
    """What the rows of a token axis stand for: first `prefix` tokens, then the cells of `grid` in row-major order.

    A cell is a position of the grid, numbered from 0. An index is a row of the token axis: cell + prefix.

    Attributes:
        grid: (rows, columns); (frames, rows, columns) for clips.
        prefix: Class, distillation and register tokens before the grid. They are always kept.
    """

    grid: tuple[int, ...]
    prefix: int = 0

    @property
    def cells(self) -> int:
        """Number of cells."""
        return prod(self.grid)

    @property
    def count(self) -> int:
        """Number of rows, prefix tokens included."""
        return self.prefix + self.cells

    def kept(self, z: float) -> int:
        """Number of rows that keep ratio `z` leaves, prefix tokens included (PaPr, Eq. 3)."""
        return self.prefix + (keep_count(self.cells, z, self.prefix) if z < 1 else self.cells)

    def index(self, cells: Tensor) -> Tensor:
        """Cells (B, k) as indices (B, prefix + k), prefix tokens first."""
        return with_prefix(cells, self.prefix)

    def cells_of(self, index: Tensor) -> Tensor:
        """Indices (B, prefix + k), prefix tokens first, as cells (B, k)."""
        return kept_patches(index, self.prefix)

    def mask(self, cells: Tensor) -> Tensor:
        """A boolean mask (B, *grid), True at `cells` (B, k)."""
        mask = torch.zeros((len(cells), self.cells), dtype=torch.bool, device=cells.device)
        return mask.scatter(1, cells, True).unflatten(1, self.grid)

    def restore(self, patches: Tensor, cells: Tensor, fill: Tensor) -> Tensor:
        """Puts patches (B, k, C) at their `cells` (B, k) of the grid, (B, C, *grid); `fill`, () or (C,), stands elsewhere."""
        batch, _, width = patches.shape
        whole = fill.expand(batch, self.cells, width)
        restored = whole.scatter(1, cells.unsqueeze(-1).expand_as(patches), patches)  # (B, n, C)
        return restored.transpose(1, 2).reshape(batch, width, *self.grid)
