"""Heads of token models: what they make of the tokens behind the blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .positions import Sizes
from .views import View

CLASSES = 5


@dataclass
class Answer:
    """A result with names, as transformers returns it."""

    logits: Tensor
    hidden: Tensor


class Head(nn.Module):
    """A head that reads tokens (B, N, C) in the way that its kind says."""

    def __init__(self, sizes: Sizes, kind: str) -> None:
        super().__init__()
        self.sizes, self.kind = sizes, kind
        width = sizes.width
        self.fc = nn.Linear(2 * width if kind == "class and mean" else width, CLASSES)
        if kind == "flat":
            self.fc = nn.Linear(width * sizes.tokens, CLASSES)
        elif kind in ("pool", "pool by scores", "library pool"):
            self.query = nn.Parameter(torch.zeros(1, 1, width))
            self.score = nn.Linear(width, 1)
            self.inner = nn.MultiheadAttention(width, 2, batch_first=True) if kind == "library pool" else nn.Identity()
        elif kind == "dense":
            self.conv = nn.Conv2d(width, 3, 3, padding=1)
        elif kind in ("dictionary", "tuple", "dataclass"):
            self.other = nn.Linear(width, 3)

    @property
    def end(self) -> int | None:
        """Where patches end, counted from behind."""
        return -self.sizes.suffix or None

    def forward(self, x: Tensor) -> Any:
        return self.answer(x, _Plain(self.sizes))

    def seen(self, x: Tensor, view: View) -> Any:
        """The oracle: the same, but every reading of tokens by place is checked."""
        return self.answer(x, _Checked(self.sizes, view))

    def answer(self, x: Tensor, read: _Plain) -> Any:
        """The output, where `read` reads tokens by their places."""
        kind = self.kind
        if kind in ("tuple", "dictionary", "dataclass"):
            mean = read.patches(x).mean(dim=1)
            if kind == "tuple":
                return self.fc(read.one(x, 0)), (self.other(mean), x)
            if kind == "dictionary":
                return {"logits": self.fc(read.one(x, 0)), "more": [self.other(mean)]}
            return Answer(self.fc(mean), x)
        if kind == "sequence":
            return x
        if kind in ("grid", "dense", "pooled grid", "upsampled"):
            return self._laid_out(x, read)
        if kind == "logits first":
            return self.fc(x).mean(dim=1)
        if kind == "flat":
            return self.fc(read.everything(x).flatten(1))
        return self.fc(self._pooled(x, read))

    def _pooled(self, x: Tensor, read: _Plain) -> Tensor:
        match self.kind:
            case "class":
                return read.one(x, 0)
            case "last":
                return read.one(x, -1)
            case "picked":
                return read.one(x, self.sizes.prefix + 1)
            case "mean":
                return read.mean(read.patches(x), self.sizes.prefix)
            case "mean of fixed rows":
                return read.rows(x, self.sizes.prefix, self.sizes.prefix + self.sizes.patches).mean(dim=1)
            case "sum":
                return x.sum(dim=1) / self.sizes.tokens
            case "sum by shape":
                return x.sum(dim=1) / x.shape[1]
            case "largest":
                return x.max(dim=1).values
            case "deviation":
                return x.std(dim=1, correction=0)
            case "distilled":
                return (read.one(x, 0) + read.one(x, 1)) / 2
            case "sum by shape of patches":
                return read.patches(x).sum(dim=1) / (x.shape[1] - self.sizes.prefix - self.sizes.suffix)
            case "powers":
                return x.abs().pow(3).mean(dim=1).pow(1 / 3)
            case "adaptive":
                return nn.functional.adaptive_avg_pool1d(x.transpose(1, 2), 1).squeeze(-1)
            case "log of sums":
                return x.logsumexp(dim=1)
            case "median":
                return x.median(dim=1).values
            case "last rows":
                return read.rows(x, -self.sizes.patches - self.sizes.suffix, None).mean(dim=1)
            case "class and mean":
                return torch.cat([read.one(x, 0), read.mean(read.patches(x), self.sizes.prefix)], dim=-1)
            case "pool":
                return ((self.query @ x.transpose(1, 2)).softmax(dim=-1) @ x)[:, 0]
            case "library pool":
                return self.inner(self.query.expand(x.shape[0], -1, -1), x, x, need_weights=False)[0].squeeze(1)
            case "pool by scores":
                return (torch.softmax(self.score(x), dim=1) * x).sum(dim=1)
            case _:
                return read.mean(x, 0)

    def _laid_out(self, x: Tensor, read: _Plain) -> Tensor:
        if self.kind == "pooled grid":
            return self.fc(read.patches(x).mean(dim=1))
        maps = read.maps(x)
        if self.kind == "grid":
            return maps
        if self.kind == "dense":
            return self.conv(maps)
        return nn.functional.interpolate(maps, scale_factor=2.0, mode="bilinear")


class PooledGrid(Head):
    """Lays the tokens out as their grid, and only pools it."""

    def forward(self, x: Tensor) -> Any:
        return self.fc(_Plain(self.sizes).maps(x).mean(dim=(2, 3)))


class _Plain:
    """Reads tokens by their places, as a user's code does."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes

    def one(self, x: Tensor, index: int) -> Tensor:
        return x[:, index]

    def patches(self, x: Tensor) -> Tensor:
        return x[:, self.sizes.prefix : -self.sizes.suffix or None]

    def mean(self, x: Tensor, first: int) -> Tensor:
        return x.mean(dim=1)

    def rows(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        return x[:, start:stop]

    def everything(self, x: Tensor) -> Tensor:
        return x

    def maps(self, x: Tensor) -> Tensor:
        rest = self.patches(x)
        return rest.transpose(1, 2).reshape(x.shape[0], x.shape[2], *self.sizes.grid)


class _Checked(_Plain):
    """Reads tokens by their places where these mean the same as in the dense model."""

    def __init__(self, sizes: Sizes, view: View) -> None:
        super().__init__(sizes)
        self.view = view

    def one(self, x: Tensor, index: int) -> Tensor:
        return self.view.read(x, index)

    def patches(self, x: Tensor) -> Tensor:
        return self.view.part(x, self.sizes.prefix, -self.sizes.suffix or None)

    def mean(self, x: Tensor, first: int) -> Tensor:
        return self.view.mean(x, first)

    def rows(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        return self.view.part(x, start, stop)

    def everything(self, x: Tensor) -> Tensor:
        end = x.shape[1] - self.sizes.suffix
        return torch.cat([x[:, : self.sizes.prefix], self.view.laid_out(x), x[:, end:]], dim=1)

    def maps(self, x: Tensor) -> Tensor:
        return self.view.laid_out(x).transpose(1, 2).unflatten(2, self.sizes.grid)


KINDS: tuple[str, ...] = (
    "class", "last", "mean", "all", "largest", "deviation", "sum", "sum by shape", "class and mean", "pool", "library pool",
    "pool by scores", "tuple", "dictionary", "dataclass", "sequence", "grid", "dense", "upsampled", "pooled grid", "picked",
    "mean of fixed rows", "flat", "distilled", "sum by shape of patches", "powers", "adaptive", "log of sums", "median",
    "last rows", "logits first",
)  # fmt: skip


def make_head(sizes: Sizes, kind: str) -> Head:
    """The head of that kind."""
    made: Callable[[Sizes, str], Head] = PooledGrid if kind == "pooled grid" else Head
    return made(sizes, kind)
