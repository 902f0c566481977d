"""Random models that keep a grid: ConvNeXt-like, Swin-like, and both in one; `seen` is the oracle of their pixel operators."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention
from .positions import Sizes
from .spec import Spec
from .views import UndefinedError, View

WINDOW = 2


class PixelMlp(nn.Module):
    """Two layers for each position of a grid (B, h, w, C), plain or with something that is not for each position."""

    def __init__(self, width: int, grid: tuple[int, int], trap: str) -> None:
        super().__init__()
        self.trap, self.grid = trap, grid
        self.first, self.last = nn.Linear(width, width + 4), nn.Linear(width + 4, width)
        hidden = width + 4
        if trap == "group norm":
            self.inner: nn.Module = nn.GroupNorm(1, hidden)
        elif trap == "batch norm":
            self.inner = nn.BatchNorm2d(hidden)
        elif trap == "squeeze":
            self.inner = nn.Linear(hidden, hidden)
        elif trap == "depthwise":
            self.inner = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        else:
            self.inner = nn.Identity()
        if trap in ("table", "response"):
            self.table = nn.Parameter(torch.zeros(*(grid if trap == "table" else (1, 1)), hidden))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.trapped(F.gelu(self.first(x))))

    def trapped(self, x: Tensor) -> Tensor:
        """The hidden values, with the trap."""
        if x.ndim == 3 and self.trap not in ("", "whole batch"):
            return self.trapped(x.unflatten(1, self.grid)).flatten(1, 2)
        match self.trap:
            case "group norm" | "batch norm":
                return self.inner(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            case "depthwise":
                return x + self.inner(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            case "squeeze":
                return x * self.inner(x.mean(dim=(1, 2), keepdim=True)).sigmoid()
            case "softmax":
                b, h, w, c = x.shape
                return x * x.reshape(b, h * w, c).softmax(dim=1).view(b, h, w, c) * 4
            case "roll":
                return x.roll(1, 2)
            case "flip":
                return x.flip(1)
            case "transpose":
                return x + x.transpose(1, 2) if x.shape[1] == x.shape[2] else x.flip(2)
            case "table":
                return x + self.table
            case "response":
                size = x.norm(p=2, dim=(1, 2), keepdim=True)
                return x + self.table * (x * (size / (size.mean(dim=-1, keepdim=True) + 1e-6)))
            case "in place":
                x.mul_(1.5)
                x += 0.2
                return x
            case "dropout":
                return F.dropout(x, 0.2, self.training)
            case "cumulative sum":
                return x + x.cumsum(dim=2) * 0.3
            case "neighbour":
                return x + F.pad(x, (0, 0, 1, 0))[:, :, :-1]
            case "count":
                return x * (x.shape[1] * x.shape[2] / 10)
            case _:
                return x

    def seen(self, x: Tensor, view: View) -> Tensor:
        """The oracle: of a pruned operator, dropped positions are zero in a response norm."""
        if self.last not in view.pruned:
            return self(x)
        hidden = F.gelu(self.first(x))
        if self.trap == "response":
            return self.last(self.trapped(hidden * view.mask(hidden)))
        if self.trap not in ("", "batch norm", "in place", "dropout", "table", "count", "whole batch", "depthwise"):
            raise UndefinedError(f"{self.trap} in a pixel operator")
        return self(x)


class ConvBlock(nn.Module):
    """As in ConvNeXt: a depthwise convolution, and an MLP for each position. Takes (B, C, h, w) or (B, h, w, C)."""

    natural = "zero"

    def __init__(self, spec: Spec, width: int, grid: tuple[int, int], trap: str) -> None:
        super().__init__()
        self.last_axis = spec.layout != "BCHW"
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = PixelMlp(width, grid, trap)
        self.gamma = nn.Parameter(torch.zeros(width)) if spec.scale else 1.0

    def forward(self, x: Tensor) -> Tensor:
        if self.last_axis:
            y = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return x + self.gamma * self.mlp(self.norm(y))
        y = self.conv(x).permute(0, 2, 3, 1)
        return x + (self.mlp(self.norm(y)) * self.gamma).permute(0, 3, 1, 2)

    def seen(self, x: Tensor, view: View) -> Tensor:
        """The oracle, on (B, h, w, C)."""
        y = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return view.add(self.mlp.last, x, self.mlp.seen(self.norm(y), view) * self.gamma)


class MixBlock(nn.Module):
    """A spatial operator with its own residual, then an MLP with its own: pooling, a plain convolution or attention."""

    natural = "keep"

    def __init__(self, spec: Spec, width: int, grid: tuple[int, int], trap: str, shift: int) -> None:
        super().__init__()
        self.kind, self.last_axis, self.shift = spec.pixel_block, spec.layout != "BCHW", shift
        self.in_row, self.grid, self.reads_batch = spec.layout == "BNC", grid, trap == "whole batch"
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = PixelMlp(width, grid, trap)
        if self.kind in ("window", "global"):
            inside = (WINDOW, WINDOW) if self.kind == "window" else grid
            inner = spec.inner if spec.inner in ("none", "bias", "relative") else "none"
            mix = "fused" if spec.attention.startswith("library") else spec.attention
            self.mix: nn.Module = Attention(Sizes(width, inside, 0, 0), spec.project, mix, inner)
        elif self.kind == "separable":
            self.mix = nn.Sequential(nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 3, padding=1, groups=width))
        else:
            self.mix = nn.Conv2d(width, width, 3, padding=1) if self.kind == "convolution" else nn.AvgPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_row:
            return self.on_row(x)
        if not self.last_axis:
            x = x.permute(0, 2, 3, 1)
        x = x + self.mixed(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x if self.last_axis else x.permute(0, 3, 1, 2)

    def on_row(self, x: Tensor) -> Tensor:
        """The block on positions in a row, (B, h * w, C), as the original Swin has it."""
        b, n, c = x.shape
        assert n == self.grid[0] * self.grid[1], "input feature has wrong size"
        x = x + self.mixed(self.norm1(x).view(b, *self.grid, c)).view(b, n, c)
        return x + self.mlp(self.norm2(x))

    def mixed(self, x: Tensor) -> Tensor:
        """The spatial operator, on (B, h, w, C)."""
        if self.kind not in ("window", "global"):
            return self.mix(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        if self.kind == "global":
            return self.mix(x.reshape(b, h * w, c)).view(b, h, w, c)
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        windows = x.view(b, h // WINDOW, WINDOW, w // WINDOW, WINDOW, c).transpose(2, 3).reshape(-1, WINDOW * WINDOW, c)
        windows = self.mix(windows)
        if self.reads_batch:
            b = int(windows.shape[0] / (h * w / WINDOW / WINDOW))
        x = windows.view(b, h // WINDOW, w // WINDOW, WINDOW, WINDOW, c).transpose(2, 3).reshape(b, h, w, c)
        return torch.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x

    def seen(self, x: Tensor, view: View) -> Tensor:
        """The oracle, on (B, h, w, C)."""
        x = x + self.mixed(self.norm1(x))
        return view.add(self.mlp.last, x, self.mlp.seen(self.norm2(x), view))


class GridModel(nn.Module):
    """A stem, two stages of blocks with a downsampling between them, and a head."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.image_size = spec.image
        rows, columns = spec.grid
        below = (rows // 2, columns // 2)
        self.stem = nn.Conv2d(3, spec.width, spec.patch, spec.patch)
        self.stages = nn.ModuleList(nn.ModuleList() for _ in range(2))
        for stage, grid in zip(self.stages, ((rows, columns), below), strict=True):
            assert isinstance(stage, nn.ModuleList)
            for number in range(spec.depth):
                trap = spec.pixel_trap if number == spec.depth - 1 and grid == (rows, columns) else ""
                stage.append(self.block(grid, trap, number, upper=grid == below))
        kernel, channels = 2 if spec.down == "convolution" else 1, spec.width * (4 if spec.down == "merging" else 1)
        self.down = nn.Conv2d(channels, spec.width, kernel, kernel)
        self.norm = nn.LayerNorm(spec.width)
        self.fc = nn.Linear(spec.width, 5)

    def block(self, grid: tuple[int, int], trap: str, number: int, *, upper: bool) -> nn.Module:
        """One block of a stage; of a hybrid, the upper stage has attention."""
        spec = self.spec
        if spec.trunk == "conv" or (spec.trunk == "hybrid" and not upper):
            return ConvBlock(spec, spec.width, grid, trap)
        return MixBlock(spec, spec.width, grid, trap, number % 2)

    @property
    def last_axis(self) -> bool:
        """Whether blocks take (B, h, w, C)."""
        return self.spec.layout != "BCHW"

    def run(self, stage: nn.Module) -> list[nn.Module]:
        """The blocks of a stage in the order in which they run."""
        blocks = [*stage.children()]
        return [blocks[0], *blocks] if self.spec.body == "called twice" else blocks

    def smaller(self, x: Tensor) -> Tensor:
        """Halves the sides of (B, C, h, w)."""
        if self.spec.down == "pooling":
            x = F.max_pool2d(x, 2)
        elif self.spec.down == "merging":
            h, w = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
            x = torch.cat([x[:, :, i:h:2, j:w:2] for j in range(2) for i in range(2)], dim=1)
        return self.down(x)

    def forward(self, images: Tensor) -> Any:
        x = self.stem(images)  # (B, C, h, w)
        maps: list[Tensor] = []
        for number, stage in enumerate(self.stages):
            if number:
                x = self.smaller(x)
            if self.last_axis:
                x = x.permute(0, 2, 3, 1)
            grid = x.shape[1:3]
            if self.spec.layout == "BNC":
                x = x.flatten(1, 2)
            for block in self.run(stage):
                x = block(x)
            if self.spec.layout == "BNC":
                x = x.unflatten(1, grid)
            if self.last_axis:
                x = x.permute(0, 3, 1, 2)
            maps.append(x)
        if self.spec.head == "grid":
            return maps
        return self.fc(self.norm(x.mean(dim=(2, 3))))

    def seen(self, images: Tensor, view: View, coarse: Tensor | None = None) -> Any:
        """The oracle: operators that the view names work on kept positions."""
        x = self.stem(images)
        maps: list[Tensor] = []
        for number, stage in enumerate(self.stages):
            x = (self.smaller(x) if number else x).permute(0, 2, 3, 1)
            for block in self.run(stage):
                assert isinstance(block, ConvBlock | MixBlock)
                x = block.seen(x, view)
            x = x.permute(0, 3, 1, 2)
            maps.append(x)
        return maps if self.spec.head == "grid" else self.fc(self.norm(x.mean(dim=(2, 3))))
