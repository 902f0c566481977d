"""What is left of a model's positions, for the oracles: plain matrices that say which token stands for which places.

Nothing here is taken from papr_fx. A model that is computed with a view must give what its rewritten form gives.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from math import prod

import torch
from torch import Tensor, nn


class UndefinedError(Exception):
    """What a model does with the tokens has no meaning once some are dropped, so that pruning them must be refused."""


class UnjudgedError(Exception):
    """What a rewrite should give here is a matter of taste: neither a fault nor a success."""


@dataclass(frozen=True)
class View:
    """Tokens: which are left. Grids: which positions of an operator are.

    Attributes:
        take: (B, K, N). Row k says of which of the N dense tokens token k is the mean.
        grid: Sizes of the grid of patches.
        prefix: Tokens in front of the patches.
        suffix: Tokens behind them.
        masks: For each grid, (B, *grid), 1 where a position is kept; empty unless pixel operators are pruned.
        pruned: The last layer of each pruned operator, with what its dropped positions hold.
        fill: What dropped places of a dense head hold, "nearest" or "zero".
        ordered: Whether tokens still have known places.
        moved: Whether they are in another order than that of the embedding.
        merge: How many tokens each block merges.
        proportional: Whether attention weights a token by the number of tokens that it was merged of.
        sizes: These numbers, (B, K), once some are merged.
    """

    take: Tensor
    grid: tuple[int, ...]
    prefix: int = 0
    suffix: int = 0
    masks: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    pruned: dict[nn.Module, str] = field(default_factory=dict)
    fill: str = "nearest"
    ordered: bool = True
    moved: bool = False
    merge: int = 0
    proportional: bool = True
    sizes: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether all tokens are left, in order."""
        if not self.ordered or self.take.shape[1] != self.take.shape[2]:
            return False
        return torch.equal(self.take, torch.eye(self.take.shape[1], dtype=self.take.dtype).expand_as(self.take))

    def need_all(self, what: str) -> None:
        """Raises `UndefinedError` unless all tokens are there."""
        if not self.whole:
            raise UndefinedError(what)

    def rows(self, table: Tensor) -> Tensor:
        """What a table (N, C) holds for the tokens, (B, K, C)."""
        self._need_places("a table of positions")
        return torch.einsum("bkn,nc->bkc", self.take, table)

    def pairs(self, table: Tensor) -> Tensor:
        """What a table (H, N, N) holds for pairs of tokens, (B, H, K, K)."""
        self._need_places("a table of pairs of positions")
        return torch.einsum("bkn,hnm,blm->bhkl", self.take, table, self.take)

    def of(self, value: Tensor) -> Tensor:
        """The tokens of a dense value (B, N, C), (B, K, C)."""
        self._need_places("a value per token")
        return self.take @ value

    def read(self, x: Tensor, index: int) -> Tensor:
        """Token x[:, index], if it is the same one in the dense model."""
        self._need_places("a token by its index")
        if not bool((self.take[:, index, index] == 1).all()):
            raise UndefinedError(f"token {index} is another one than in the dense model")
        return x[:, index]

    def part(self, x: Tensor, start: int | None, stop: int | None) -> Tensor:
        """Tokens x[:, start:stop], if those are the ones that the dense model reads, as far as they are left."""
        self._need_places("tokens by their index")
        rows, columns = (torch.zeros(size, dtype=self.take.dtype) for size in self.take.shape[1:])
        columns[start:stop], rows[start:stop] = 1, 1
        if not torch.allclose(self.take @ columns, rows.expand_as(self.take[..., 0])):
            raise UndefinedError(f"tokens {start}:{stop} are others than in the dense model")
        return x[:, start:stop]

    def rolled(self, shift: int) -> View:
        """The view of tokens that were rolled."""
        return replace(self, take=self.take.roll((shift, shift), (1, 2)), moved=True)

    def flipped(self) -> View:
        """The view of tokens in reverse order."""
        return replace(self, take=self.take.flip(1, 2), moved=True)

    def without_order(self) -> View:
        """The view of tokens in an order that depends on their content."""
        return replace(self, ordered=False, moved=True)

    def mean(self, x: Tensor, first: int) -> Tensor:
        """The mean of tokens x, which start with token `first`; merged ones count as many as they are."""
        if self.sizes is None:
            return x.mean(dim=1)
        weights = self.sizes[:, first : first + x.shape[1]].unsqueeze(-1)
        return (x * weights).sum(1) / weights.sum(1)

    def add(self, last: nn.Module, residual: Tensor, branch: Tensor, *, channels: int = -1) -> Tensor:
        """A residual addition, of a pixel operator that ends with layer `last`."""
        background = self.pruned.get(last)
        if background is None:
            return residual + branch
        mask = self.mask(residual, channels)
        return residual + mask * branch if background == "keep" else mask * (residual + branch)

    def mask(self, like: Tensor, channels: int = -1) -> Tensor:
        """The mask of a grid that fits a value: (B, h, w, C), (B, C, h, w) or (B, N, C)."""
        if like.ndim == 3:
            (mask,) = [mask for grid, mask in self.masks.items() if prod(grid) == prod(self.grid)]
            ones = [torch.ones(len(mask), count, dtype=mask.dtype) for count in (self.prefix, self.suffix)]
            return torch.cat([ones[0], mask.flatten(1), ones[1]], 1).unsqueeze(-1)
        sizes = [size for axis, size in enumerate(like.shape) if axis not in (0, channels % like.ndim)]
        return self.masks[tuple(sizes)].unsqueeze(channels)

    def laid_out(self, x: Tensor) -> Tensor:
        """Tokens (B, K, C) in the places of the patches (B, n, C); dropped places hold the nearest one, or zero."""
        self._need_places("tokens in their places")
        if self.moved:
            raise UndefinedError("tokens that were moved before they are laid out")
        return torch.stack([self._filled(*sample) for sample in zip(x, self.take, strict=True)])

    def _filled(self, tokens: Tensor, take: Tensor) -> Tensor:
        count = prod(self.grid)
        holds = take[:, self.prefix : self.prefix + count] > 0  # (K, n)
        filled = [number for number in range(count) if bool(holds[:, number].any())]
        places = list(product(*map(range, self.grid)))
        rows: list[Tensor] = []
        for number, place in enumerate(places):
            near = min(filled, key=lambda other: (sum((a - b) ** 2 for a, b in zip(place, places[other], strict=True)), other))
            token = tokens[int(holds[:, near].int().argmax())]
            rows.append(torch.zeros_like(token) if self.fill == "zero" and near != number else token)
        return torch.stack(rows)

    def _need_places(self, what: str) -> None:
        if not self.ordered:
            raise UndefinedError(f"{what}, after tokens were sorted by content")


def dense_view(batch: int, grid: tuple[int, ...], prefix: int, suffix: int) -> View:
    """The view in which nothing is dropped."""
    count = prefix + prod(grid) + suffix
    return View(torch.eye(count, dtype=torch.float64).expand(batch, count, count), grid, prefix, suffix)


def token_view(groups: list[list[list[int]]], grid: tuple[int, ...], prefix: int, suffix: int, fill: str) -> View:
    """The view of tokens that stand for groups of patches, given for each sample."""
    count = prefix + prod(grid) + suffix
    matrices: list[Tensor] = []
    for sample in groups:
        whole = [[i] for i in range(prefix)] + [[prefix + i for i in group] for group in sample]
        whole += [[count - suffix + i] for i in range(suffix)]
        matrix = torch.zeros(len(whole), count, dtype=torch.float64)
        for row, group in enumerate(whole):
            matrix[row, group] = 1 / len(group)
        matrices.append(matrix)
    return View(torch.stack(matrices), grid, prefix, suffix, fill=fill)
