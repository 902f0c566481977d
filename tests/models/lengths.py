"""Models that compute with the number of their tokens, or hold tables of as many entries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .positioned import Rotary
from .traps import Behind
from .vits import Attention, Block, Shape, ToyViT, enliven


class Pooling(ToyViT):
    """The largest of each four patches, and a head of a fixed number of those."""

    def __init__(self) -> None:
        super().__init__(Shape(prefix=0))
        self.wide = nn.Linear(32, 7)
        enliven(self)

    def classify(self, x: Tensor) -> Tensor:
        return self.wide(F.max_pool1d(self.norm(x).transpose(1, 2), 4, ceil_mode=True).flatten(1))


class Partly(Attention):
    """Adds a table to all tokens but the last."""

    def __init__(self) -> None:
        super().__init__(8, 2, True)
        self.table = nn.Parameter(torch.zeros(17, 8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x[:, :-1] + self.table, x[:, -1:]], dim=1))


class EqualEnds(ToyViT):
    """As many tokens in front of the patches as behind them, and a table that leaves out one end."""

    def __init__(self) -> None:
        super().__init__(Shape())
        self.last = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos = nn.Parameter(torch.zeros(1, 18, 8))
        self.blocks = nn.ModuleList(Block(8, Partly()) for _ in range(2))
        enliven(self)

    def tokens(self, x: Tensor) -> Tensor:
        first, last = (part.expand(x.shape[0], -1, -1) for part in (self.first, self.last))
        return torch.cat([first, self.patches(x), last], dim=1) + self.pos

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)[:, -1])


class Smoothed(ToyViT):
    """Lays its patches out as their grid, and averages neighbours there."""

    def classify(self, x: Tensor) -> Tensor:
        grid = self.norm(x)[:, 1:].transpose(1, 2).reshape(x.shape[0], 8, 4, 4)
        return self.head(F.avg_pool2d(grid, 3, 1, 1).amax((2, 3)))


class Picking(Attention):
    """Picks its tokens by their numbers, as many as there are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, torch.arange(x.shape[1], device=x.device)])


class FadingBlock(Block):
    """A block that gets the bias of its scores."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.attn.qkv(self.norm1(x)).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, bias)
        x = x + self.attn.proj(mixed.transpose(1, 2).reshape(b, n, c))
        return x + self.mlp(self.norm2(x))


class Fading(ToyViT):
    """A bias for each pair of tokens that halves in place from block to block."""

    def __init__(self) -> None:
        super().__init__(Shape(pool="cls"))
        self.bias = nn.Parameter(torch.zeros(1, 2, 17, 17))
        self.blocks = nn.ModuleList(FadingBlock(8, Attention(8, 2, True)) for _ in range(2))
        enliven(self)

    def forward(self, x: Tensor) -> Tensor:
        x, bias = self.tokens(x), self.bias.clone()
        for block in self.blocks:
            x = block(x, bias[0].mul_(0.5))
        return self.classify(x)


class Gated(Attention):
    """Adds a table, as wide as there are patches, times a number for each token."""

    def __init__(self) -> None:
        super().__init__(16, 2, True)
        self.gate = nn.Linear(16, 1)
        self.table = nn.Parameter(torch.zeros(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.gate(x) * self.table)


def gated() -> nn.Module:
    """A ViT with as many channels as patches, and such tables."""
    model = ToyViT(Shape(prefix=0), width=16)
    for block in model.blocks:
        block.attn = Gated()
    return enliven(model)


class Ended(Attention):
    """Adds a table to the patches, between one token in front of them and two behind."""

    def __init__(self) -> None:
        super().__init__(8, 2, True)
        self.table = nn.Parameter(torch.zeros(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x[:, :1], x[:, 1:-2] + self.table, x[:, -2:]], dim=1))


def ended() -> nn.Module:
    """A ViT with such tables, and two tokens behind the patches."""
    model = Behind()
    model.blocks = nn.ModuleList(Block(8, Ended()) for _ in range(2))
    return enliven(model)


class Asking(Rotary):
    """Asks its table how many patches there are."""

    def turn(self, x: Tensor) -> Tensor:
        cosine, sine = self.angles.cos(), self.angles.sin()
        count = cosine.shape[0]
        first, rest = x.split((x.shape[2] - count, count), dim=2)
        return torch.cat([first, rest * cosine + rest.flip(-1) * sine], dim=2)


def asking() -> nn.Module:
    """A ViT with such attentions."""
    model = ToyViT(Shape(pool="cls"))
    for block in model.blocks:
        block.attn = Asking(model.shape, late=False)
    return enliven(model)


class Rounded(ToyViT):
    """Pads its images to whole patches."""

    def __init__(self) -> None:
        super().__init__(Shape())
        self.image_size = 7, 12

    def patches(self, x: Tensor) -> Tensor:
        return super().patches(F.pad(x, (0, 0, 0, 1)))


class Offset(ToyViT):
    """Embeds patches one pixel before their places, by a padded convolution."""

    def __init__(self) -> None:
        super().__init__(Shape(image=(32, 32), patch=(8, 8)))
        self.proj = nn.Conv2d(3, 8, 8, 8, padding=1)
        enliven(self)
