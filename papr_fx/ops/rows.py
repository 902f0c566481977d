"""The rows of a token axis: prefix tokens, one row per position of a grid, suffix tokens."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .positions import keep_count, kept_patches, with_prefix, with_suffix
from .quads import quad_counts, token_places


class Span(NamedTuple):
    """Some rows of a token axis, without those at its ends.

    Attributes:
        first: How many rows come before them: 0, or all prefix tokens.
        behind: How many rows come behind them: 0, or all suffix tokens.
    """

    first: int = 0
    behind: int = 0


@dataclass(frozen=True)
class TokenRows:
    """What the rows of a token axis stand for: `prefix` tokens, the cells of `grid` in row-major order, `suffix` tokens.

    A cell is a position of the grid, numbered from 0. An index is a row of the token axis: cell + prefix.

    Attributes:
        grid: (rows, columns); (frames, rows, columns) for clips.
        prefix: Class, distillation and register tokens before the grid. They are always kept.
        suffix: Tokens behind the grid, such as detection tokens or prompts. They are always kept.
    """

    grid: tuple[int, ...]
    prefix: int = 0
    suffix: int = 0

    @property
    def cells(self) -> int:
        """Number of cells."""
        return prod(self.grid)

    @property
    def count(self) -> int:
        """Number of rows, prefix and suffix tokens included."""
        return self.others + self.cells

    @property
    def others(self) -> int:
        """Number of tokens that are no patches."""
        return self.prefix + self.suffix

    @property
    def spans(self) -> tuple[Span, ...]:
        """All rows, and those without prefix tokens, without suffix tokens, and without either."""
        ends = [Span(), Span(self.prefix), Span(0, self.suffix), Span(self.prefix, self.suffix)]
        return tuple(dict.fromkeys(ends))

    def kept(self, z: float, *, coarse: bool = False) -> int:
        """Number of rows that keep ratio `z` leaves, prefix and suffix tokens included (PaPr, Eq. 3), or with coarse tokens."""
        if z == 1:
            return self.count
        patches = keep_count(self.cells, z, self.others)
        return self.others + (quad_counts(self.grid, patches).tokens if coarse else patches)

    def index(self, cells: Tensor) -> Tensor:
        """Cells (B, k) as indices (B, prefix + k + suffix)."""
        return with_suffix(with_prefix(cells, self.prefix), self.prefix + self.cells, self.suffix)

    def cells_of(self, index: Tensor) -> Tensor:
        """Indices (B, prefix + k + suffix) as cells (B, k)."""
        return kept_patches(index, self.prefix, self.suffix)

    def mask(self, cells: Tensor) -> Tensor:
        """A boolean mask (B, *grid), True at `cells` (B, k). Quads, which are numbered behind the grid, do not count."""
        mask = torch.zeros((len(cells), self.cells + 1), dtype=torch.bool, device=cells.device)
        return mask.scatter(1, cells.clamp(max=self.cells), True)[:, : self.cells].unflatten(1, self.grid)

    def places(self, cells: Tensor) -> Tensor:
        """Which of `cells` (B, k), some of which may be quads, stands for each position, (B, *grid); -1 where none does."""
        return token_places(cells, self.grid, self.suffix).unflatten(1, self.grid)

    def restore(self, patches: Tensor, cells: Tensor, fill: Tensor) -> Tensor:
        """Puts patches (B, k, C) at their `cells` (B, k) of the grid, (B, C, *grid); `fill`, () or (C,), stands elsewhere."""
        places = self.places(cells).flatten(1).unsqueeze(-1)  # (B, n, 1)
        spread = patches.gather(1, places.clamp(min=0).expand(-1, -1, patches.shape[-1]))  # (B, n, C)
        return torch.where(places < 0, fill, spread).transpose(1, 2).unflatten(2, self.grid)
