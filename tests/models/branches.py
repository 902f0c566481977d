"""Convolutional and windowed models of whose branches some positions are not enough."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .vits import Attention, Block, Shape, ToyViT, enliven
from .windows import ToyWindows


class ConvBlock(nn.Module):
    """A block of a convolution and an MLP."""

    def __init__(self, groups: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        self.mlp = nn.Sequential(nn.Conv2d(8, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.conv(x))


class TransposedBlock(ConvBlock):
    """Rows and columns change places in its branch."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.conv(x)).transpose(2, 3)


class GatedBlock(ConvBlock):
    """A branch that reads the convolution and the shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.conv(x) * x.sigmoid())


class ExcitedBlock(ConvBlock):
    """A branch that its means over space scale, in front of its convolution and in the end."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.mean((2, 3), keepdim=True).sigmoid()
        return x + self.mlp(self.conv(x * scale)) * scale


class ConvTrunk(nn.Module):
    """Images (B, 3, 16, 16) through a stem and some blocks."""

    img_size = 16, 16

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Conv2d(3, 8, 2, 2), nn.Sequential(*blocks), nn.Linear(8, 5)
        enliven(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Elsewhere(ConvTrunk):
    """A branch that starts at a second stem, which others read too."""

    def __init__(self) -> None:
        super().__init__(ConvBlock())
        self.other = nn.Conv2d(3, 8, 2, 2)
        enliven(self)

    def forward(self, x: Tensor) -> Tensor:
        other = self.other(x)
        grid = self.stem(x) + self.blocks[0].mlp(other)
        return self.head((self.blocks(grid) + other).mean((2, 3)))


class Telling(ConvTrunk):
    """A head that reads what is inside its branches too."""

    def __init__(self) -> None:
        super().__init__(ConvBlock(), ConvBlock())
        self.more = nn.Linear(16, 5)
        enliven(self)

    def forward(self, x: Tensor) -> Tensor:
        x, told = self.stem(x), 0
        for block in self.blocks:
            hidden = block.mlp[0](block.conv(x))
            told = told + self.more(hidden.amax((2, 3)))
            x = x + block.mlp[2](block.mlp[1](hidden))
        return told + self.head(x.mean((2, 3)))


class BoundedWindows(ToyWindows):
    """Bounds its grid, and moves it into windows, where an MLP runs."""

    def __init__(self) -> None:
        super().__init__()
        self.bounded = nn.Hardtanh(-3, 3)
        self.mlp = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
        enliven(self)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.bounded(self.stem(x)).permute(0, 2, 3, 1)  # (B, 4, 4, 6)
        b, h, w, c = grid.shape
        windows = grid.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        windows = windows + self.mlp(windows)
        return self.head(self.norm(windows).mean((1, 2)))


class Flat(nn.Module):
    """An MLP on the positions of a grid in one axis, (B, N, C)."""

    img_size = 16, 16

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.Linear(8, 5)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        enliven(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head((x + self.mlp(self.norm(x))).mean(1))


class BranchFirst(Block):
    """A block that adds its shortcuts to its branches, and not the other way round."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x)) + x
        return self.mlp(self.norm2(x)) + x


def branches_first(**shape: Any) -> nn.Module:
    """A ViT of such blocks."""
    model = ToyViT(Shape(**shape))
    model.blocks = nn.ModuleList(BranchFirst(8, Attention(8, 2, True)) for _ in range(2))
    return enliven(model)
