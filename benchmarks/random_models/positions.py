"""Positions that attentions use beyond the embedding: rotary tables, biases, masks, numbers that are made in forward."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .views import View

HEADS = 2


@dataclass(frozen=True)
class Sizes:
    """Sizes of a token stream."""

    width: int
    grid: tuple[int, ...]
    prefix: int
    suffix: int

    @property
    def patches(self) -> int:
        """How many patches."""
        return prod(self.grid)

    @property
    def tokens(self) -> int:
        """How many tokens."""
        return self.prefix + self.patches + self.suffix

    @property
    def head(self) -> int:
        """Channels of a head."""
        return self.width // HEADS


class NoPositions(nn.Module):
    """Attention that knows nothing of places."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.count = sizes.tokens

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v

    def bias(self, x: Tensor) -> Tensor | None:
        """What is added to the scores."""
        return None

    def seen(self, q: Tensor, k: Tensor, v: Tensor, view: View) -> tuple[Tensor, Tensor, Tensor]:
        """The oracle's queries, keys and values."""
        return q, k, v

    def seen_bias(self, view: View) -> Tensor | float:
        """What the oracle adds to the scores."""
        return 0.0


class Rotary(NoPositions):
    """Turns queries and keys of the patches by tables (n, D)."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, sizes: Sizes, *, late: bool) -> None:
        super().__init__(sizes)
        self.prefix, self.suffix, self.late = sizes.prefix, sizes.suffix, late
        angles = torch.linspace(0.2, 3, sizes.patches).outer(torch.arange(1.0, sizes.head + 1) ** 0.7)
        self.register_buffer("cosine", angles.cos())
        self.register_buffer("sine", angles.sin())

    def turn(self, x: Tensor) -> Tensor:
        """Queries or keys (B, H, N, D), turned."""
        end = x.shape[2] - self.suffix
        first, rest, last = x[:, :, : self.prefix], x[:, :, self.prefix : end], x[:, :, end:]
        cosine, sine = (self.cosine[None, None], self.sine[None, None]) if self.late else (self.cosine, self.sine)
        return torch.cat([first, rest * cosine + rest.flip(-1) * sine, last], dim=2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.turn(q), self.turn(k), v

    def seen(self, q: Tensor, k: Tensor, v: Tensor, view: View) -> tuple[Tensor, Tensor, Tensor]:
        around = (0, 0, self.prefix, self.suffix)
        cosine = view.rows(F.pad(self.cosine, around, value=1.0)).unsqueeze(1)
        sine = view.rows(F.pad(self.sine, around)).unsqueeze(1)
        return q * cosine + q.flip(-1) * sine, k * cosine + k.flip(-1) * sine, v


class RotaryOfAll(NoPositions):
    """Turns queries and keys of all tokens by a table (1, N, D)."""

    angles: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        angles = torch.linspace(0.2, 3, sizes.tokens).outer(torch.arange(1.0, sizes.head + 1) ** 0.7)
        self.register_buffer("table", torch.stack([angles.cos(), angles.sin()]))

    table: Tensor

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cosine, sine = self.table.unbind(0)
        return q * cosine + q.flip(-1) * sine, k * cosine + k.flip(-1) * sine, v

    def seen(self, q: Tensor, k: Tensor, v: Tensor, view: View) -> tuple[Tensor, Tensor, Tensor]:
        cosine, sine = (view.rows(table).unsqueeze(1) for table in self.table)
        return q * cosine + q.flip(-1) * sine, k * cosine + k.flip(-1) * sine, v


class Added(NoPositions):
    """Adds a table (1, 1, N, D) to queries, keys or values."""

    def __init__(self, sizes: Sizes, to: str) -> None:
        super().__init__(sizes)
        self.to_what = to
        self.table = nn.Parameter(torch.zeros(1, 1, sizes.tokens, sizes.head))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.to_what == "queries":
            return q + self.table, k, v
        return (q, k + self.table, v) if self.to_what == "keys" else (q, k, v + self.table)

    def seen(self, q: Tensor, k: Tensor, v: Tensor, view: View) -> tuple[Tensor, Tensor, Tensor]:
        added = {
            name: view.rows(self.table[0, 0]).unsqueeze(1) if name == self.to_what else 0
            for name in ("queries", "keys", "values")
        }
        return q + added["queries"], k + added["keys"], v + added["values"]


class Biased(NoPositions):
    """Adds a table to the scores: (1, H, N, N), or with one query or one key for all."""

    def __init__(self, sizes: Sizes, axes: str) -> None:
        super().__init__(sizes)
        queries, keys = (sizes.tokens if axis in axes else 1 for axis in "qk")
        self.table = nn.Parameter(torch.zeros(1, HEADS, queries, keys))

    def bias(self, x: Tensor) -> Tensor | None:
        return self.table

    def seen_bias(self, view: View) -> Tensor | float:
        return view.pairs(self.table[0].expand(-1, self.count, self.count))


class Relative(NoPositions):
    """Looks the bias of two patches up by their distance in rows and columns, as Swin and BEiT do; others have none."""

    index: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        places = torch.cartesian_prod(*[torch.arange(size) for size in sizes.grid])  # (n, axes)
        spans = [2 * size - 1 for size in sizes.grid]
        index = torch.zeros(sizes.patches, sizes.patches, dtype=torch.long)
        for axis, span in enumerate(spans):
            apart = places[:, None, axis] - places[None, :, axis]
            index = index * span + apart + sizes.grid[axis] - 1
        self.register_buffer("index", index)
        self.table = nn.Parameter(torch.zeros(prod(spans), HEADS))
        self.around = (sizes.prefix, sizes.suffix, sizes.prefix, sizes.suffix)

    def bias(self, x: Tensor) -> Tensor | None:
        found = self.table[self.index.view(-1)].view(*self.index.shape, -1).permute(2, 0, 1)  # (H, n, n)
        return F.pad(found, self.around).unsqueeze(0) if any(self.around) else found.unsqueeze(0)

    def seen_bias(self, view: View) -> Tensor | float:
        return view.pairs(F.pad(self.table[self.index].permute(2, 0, 1), self.around))


class Distance(NoPositions):
    """Numbers the tokens in forward, and takes their distance as a penalty."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.slope = nn.Parameter(torch.zeros(HEADS, 1, 1))

    def bias(self, x: Tensor) -> Tensor | None:
        numbers = torch.arange(x.shape[1], device=x.device)
        return -(numbers[:, None] - numbers[None, :]).abs() * self.slope

    def seen_bias(self, view: View) -> Tensor | float:
        numbers = torch.arange(self.count)
        return view.pairs(-(numbers[:, None] - numbers).abs() * self.slope)


class Masked(NoPositions):
    """A mask of yes and no for pairs of tokens, the same in each forward pass."""

    allowed: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        numbers = torch.arange(sizes.tokens)
        self.register_buffer("allowed", (numbers[:, None] * 7 + numbers * 3) % 5 > 0)
        self.allowed.fill_diagonal_(True)

    def bias(self, x: Tensor) -> Tensor | None:
        return self.allowed

    def seen_bias(self, view: View) -> Tensor | float:
        return view.pairs((~self.allowed)[None].double() * -1e4)


def inner_positions(kind: str, sizes: Sizes) -> NoPositions:
    """The positions that attention uses."""
    match kind:
        case "rotary" | "rotary, four axes":
            return Rotary(sizes, late=kind != "rotary")
        case "rotary of all":
            return RotaryOfAll(sizes)
        case "queries" | "keys" | "values":
            return Added(sizes, kind)
        case "bias" | "bias of keys" | "bias of queries":
            return Biased(sizes, {"bias": "qk", "bias of keys": "k", "bias of queries": "q"}[kind])
        case "relative":
            return Relative(sizes)
        case "distance":
            return Distance(sizes)
        case "mask":
            return Masked(sizes)
        case _:
            return NoPositions(sizes)
