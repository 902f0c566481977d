"""Models of which a wrong rewrite would go unseen if nobody looked: each holds one trap. Most of them must be refused."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attentions import PairBiased
from .vits import Attention, Block, Shape, ToyViT, enliven


class Behind(ToyViT):
    """Two tokens behind the patches, with a bias for each pair of tokens, and a head on the last one."""

    def __init__(self) -> None:
        super().__init__(Shape())
        self.last = nn.Parameter(torch.zeros(1, 2, 8))
        self.pos = nn.Parameter(torch.zeros(1, 19, 8))
        self.blocks = nn.ModuleList(Block(8, PairBiased(19)) for _ in range(2))
        enliven(self)

    def tokens(self, x: Tensor) -> Tensor:
        first, last = (part.expand(x.shape[0], -1, -1) for part in (self.first, self.last))
        return torch.cat([first, self.patches(x), last], dim=1) + self.pos

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)[:, -1])


class Between(ToyViT):
    """A token in the middle of the patches."""

    def tokens(self, x: Tensor) -> Tensor:
        patches = self.patches(x)
        return torch.cat([patches[:, :8], self.first.expand(x.shape[0], -1, -1), patches[:, 8:]], dim=1) + self.pos


class Mixed(ToyViT):
    """Mixes its tokens by a sum over those before, as no attention does."""

    def classify(self, x: Tensor) -> Tensor:
        return super().classify(x.cumsum(1))


class Batched(ToyViT):
    """Reads the batch size as a Python number."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if len(x) < 3 else 2.0)


class Counted(ToyViT):
    """Reads the number of tokens as a Python number, behind its blocks."""

    def classify(self, x: Tensor) -> Tensor:
        return super().classify(x) * (2.0 if x.shape[1] > 12 else 1.0)


class Drawing(ToyViT):
    """Draws random numbers of a fixed size in training."""

    def tokens(self, x: Tensor) -> Tensor:
        tokens = super().tokens(x)
        return tokens * torch.rand(8) if self.training else tokens


class Sliced(ToyViT):
    """Takes its patches as the last sixteen tokens."""

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)[:, -16:].mean(1))


class Twins(nn.Module):
    """Two trunks beside each other."""

    img_size = 8, 12

    def __init__(self, depth: int = 2, width: int = 8) -> None:
        super().__init__()
        self.one, self.other = ToyViT(Shape(pool="cls")), ToyViT(Shape(pool="avg", depth=depth), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(x)


class Overlapping(ToyViT):
    """Embeds patches by windows that overlap."""

    def __init__(self) -> None:
        super().__init__(Shape())
        self.proj = nn.Conv2d(3, 8, 5, (2, 3), padding=(2, 1))
        enliven(self)


class Normalised(ToyViT):
    """Normalises the embeddings of all patches together."""

    def patches(self, x: Tensor) -> Tensor:
        return F.layer_norm(super().patches(x), (16, 8))


class Decoding(ToyViT):
    """A second reader of the embeddings."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.head(self.patches(x).amax(1))


class Changing(ToyViT):
    """Changes its images in place, and its tokens."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x.mul_(0.5)
        x = self.tokens(x)
        x.add_(1)
        for block in self.blocks:
            x = block(x)
        return self.classify(x)


class Sized(ToyViT):
    """Takes any image size, and keeps a number of the traced one."""

    def __init__(self, **shape: Any) -> None:
        super().__init__(Shape(pool="cls", **shape))
        self.table = nn.Parameter(torch.zeros(1, 8, 4, 4))
        enliven(self)

    def tokens(self, x: Tensor) -> Tensor:
        grid = self.proj(x)
        table = F.interpolate(self.table, grid.shape[2:], mode="bilinear")
        tokens = (grid + table).flatten(2).transpose(1, 2)
        return torch.cat([self.first.expand(x.shape[0], -1, -1), tokens], dim=1)


class Ranked(Sized):
    """The same, and divides by the width of its images as a Python number."""

    def classify(self, x: Tensor) -> Tensor:
        return super().classify(x) / int(self.width)

    def forward(self, x: Tensor) -> Tensor:
        self.width = x.shape[-1]
        return super().forward(x)


class Training(ToyViT):
    """Has other code in training mode: a second head on the mean of its tokens."""

    def classify(self, x: Tensor) -> Tensor:
        found = super().classify(x)
        return found + self.head(x.mean(1)) * 0.5 if self.training else found


class Dropped(ToyViT):
    """Drops every second patch itself in training."""

    def tokens(self, x: Tensor) -> Tensor:
        tokens = super().tokens(x)
        return torch.cat([tokens[:, :1], tokens[:, 1::2]], dim=1) if self.training else tokens


class Columns(ToyViT):
    """Lays its patches out as their grid in column order, and convolves them there."""

    def __init__(self) -> None:
        super().__init__(Shape())
        self.conv = nn.Conv2d(8, 7, 3)
        enliven(self)

    def classify(self, x: Tensor) -> Tensor:
        grid = self.norm(x)[:, 1:].transpose(1, 2).reshape(x.shape[0], 8, 4, 4)
        return self.conv(grid).amax((2, 3))


class Pooled(ToyViT):
    """Lays its patches out as their grid, which it only averages."""

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)[:, 1:].reshape(x.shape[0], 4, 4, 8).mean((1, 2)))


class Gridded(ToyViT):
    """Returns its features as a grid beside the logits."""

    def classify(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().classify(x), x[:, 1:].unflatten(1, (4, 4))


class SequenceFirst(ToyViT):
    """Runs its blocks on tokens (N, B, C)."""

    def __init__(self) -> None:
        super().__init__(Shape())
        layers = (nn.TransformerEncoderLayer(8, 2, 16, 0.0) for _ in range(2))
        self.blocks = nn.ModuleList(layers)
        enliven(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x).transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        return self.classify(x.transpose(0, 1))


class HalfNorm(nn.Module):
    """A block of a convolution, and of an MLP behind a norm whose statistics follow the batch in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.mlp = nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.GELU(), nn.Conv2d(16, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(self.conv(x))
        return x + self.mlp(x)


class ConvNet(nn.Module):
    """Images (B, 3, 16, 24) through a stem and such blocks on one grid."""

    img_size = 16, 24

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.blocks = nn.Sequential(HalfNorm(), HalfNorm())
        self.head = nn.Linear(8, 5)
        enliven(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Padded(ToyViT):
    """Lays its patches out as their grid, and takes means of windows there: of 3 x 3 places, padded, and of 2 x 2."""

    def classify(self, x: Tensor) -> Tensor:
        grid = self.norm(x)[:, 1:].transpose(1, 2).reshape(x.shape[0], 8, 4, 4)
        smooth = F.conv2d(grid, grid.new_ones(8, 1, 3, 3), padding=1, groups=8)
        return self.head(F.avg_pool2d(smooth, 2, ceil_mode=True).amax((2, 3)))


class Stacked(ToyViT):
    """Lays its patches out beside twice their values, along the axis of the batch, and convolves them."""

    def __init__(self) -> None:
        super().__init__(Shape())
        self.conv = nn.Conv2d(8, 7, 3, padding=1)
        enliven(self)

    def classify(self, x: Tensor) -> Tensor:
        patches = self.norm(x)[:, 1:]
        grid = torch.cat([patches, 2 * patches]).transpose(1, 2).reshape(-1, 8, 4, 4)
        return self.conv(grid).amax((2, 3)).unflatten(0, (2, -1)).sum(0)


class Decoded(ToyViT):
    """Convolves the grid of its patches, and runs two more blocks on what comes out."""

    def __init__(self) -> None:
        super().__init__(Shape())
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.decoder = nn.ModuleList(Block(8, Attention(8, 2, True)) for _ in range(2))
        enliven(self)

    def classify(self, x: Tensor) -> Tensor:
        grid = self.conv(x[:, 1:].transpose(1, 2).reshape(x.shape[0], 8, 4, 4))
        x = grid.flatten(2).transpose(1, 2)
        for block in self.decoder:
            x = block(x)
        return super().classify(x)


class Averaging(ToyViT):
    """Averages channels too, and its tokens."""

    def classify(self, x: Tensor) -> Tensor:
        return super().classify(x * x.mean(2, keepdim=True))


class SpaceNormed(ConvNet):
    """Normalises over space inside its branches, which so mix positions."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.mlp[1] = nn.GroupNorm(2, 16)
        enliven(self)
