"""Random token models: an embedding, blocks that are held in some way, and a head; `seen` is the oracle of the whole."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Block, traps_at
from .heads import make_head
from .positions import Sizes
from .spec import Spec
from .traps import Trap
from .views import UnjudgedError, View


class Embedding(nn.Module):
    """Images (B, 3, H, W), or clips (B, 3, T, H, W), to patches (B, n, C)."""

    def __init__(self, sizes: Sizes, spec: Spec) -> None:
        super().__init__()
        self.kind, self.patch, self.clip = spec.embed, spec.patch, spec.trunk == "clip"
        width, (height, columns) = sizes.width, spec.patch
        self.table = nn.Parameter(torch.zeros(1, width, 2, 2)) if spec.positions == "resampled" else None
        if self.clip:
            self.proj = nn.Conv3d(3, width, (2, height, columns), (2, height, columns))
        elif self.kind in ("reshape", "unfold"):
            self.proj = nn.Linear(3 * height * columns, width)
        elif self.kind == "overlap":
            self.proj = nn.Conv2d(3, width, (height + 2, columns + 2), (height, columns), padding=1)
        else:
            self.proj = nn.Conv2d(3, width, spec.patch, spec.patch)
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.GELU()) if self.kind == "stem" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        height, columns = self.patch
        if self.kind == "unfold":
            return self.proj(F.unfold(x, self.patch, stride=self.patch).transpose(1, 2))
        if self.kind == "reshape":
            b, c, h, w = x.shape
            x = x.reshape(b, c, h // height, height, w // columns, columns).permute(0, 2, 4, 1, 3, 5)
            return self.proj(x.flatten(3).flatten(1, 2))
        x = self.proj(self.stem(x))
        if self.table is not None:
            x = x + F.interpolate(self.table, size=x.shape[-2:], mode="bilinear", align_corners=False)
        if self.kind == "column-major":
            x = x.transpose(-1, -2)
        return x.flatten(2).transpose(1, 2)


class Join(nn.Module):
    """Adds positions, and puts other tokens in front of the patches and behind them."""

    def __init__(self, sizes: Sizes, spec: Spec) -> None:
        super().__init__()
        self.sizes, self.kind = sizes, spec.positions
        width = sizes.width
        self.first = nn.Parameter(torch.zeros(1, sizes.prefix, width))
        self.last = nn.Parameter(torch.zeros(1, sizes.suffix, width))
        if self.kind in ("table", "table of patches"):
            self.table = nn.Parameter(torch.zeros(1, sizes.tokens if self.kind == "table" else sizes.patches, width))
        elif self.kind == "axes":
            self.axes = nn.ParameterList(nn.Parameter(torch.zeros(size, width)) for size in sizes.grid)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "table of patches":
            x = x + self.table
        elif self.kind == "axes":
            x = x + self.by_axes()
        elif self.kind == "waves":
            place = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
            waves = torch.outer(place, 0.4 ** torch.arange(self.sizes.width // 2, device=x.device, dtype=x.dtype))
            x = x + torch.cat([waves.sin(), waves.cos()], dim=1)
        parts = [x]
        if self.sizes.prefix:
            parts.insert(0, self.first.expand(x.shape[0], -1, -1))
        if self.sizes.suffix:
            parts.append(self.last.repeat(x.shape[0], 1, 1))
        if len(parts) > 1:
            x = torch.cat(parts, dim=1)
        return x + self.table if self.kind == "table" else x

    def by_axes(self) -> Tensor:
        """The sum of a vector for each row and each column, (n, C)."""
        total: Tensor | float = 0.0
        for axis, vectors in enumerate(self.axes):
            shape = [1] * len(self.axes) + [-1]
            shape[axis] = self.sizes.grid[axis]
            total = total + vectors.view(shape)
        assert isinstance(total, Tensor)
        return total.flatten(0, -2)


class SequenceFirst(nn.Module):
    """A block for tokens (N, B, C)."""

    def __init__(self, inner: Block) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        """The oracle, for tokens (B, N, C)."""
        return self.inner.seen(x, view)


class TokenModel(nn.Module):
    """A vision transformer, plain or with traps."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.sizes = sizes = Sizes(spec.width, spec.grid, spec.prefix, spec.suffix)
        self.image_size = spec.image
        self.embed, self.join = Embedding(sizes, spec), Join(sizes, spec)
        last = min(1, spec.depth - 1)
        inside = [traps_at(spec, sizes, "inside") if number == last else [] for number in range(spec.depth)]
        blocks = [Block(sizes, spec, found) for found in inside]
        if spec.body == "sequence first":
            blocks = [SequenceFirst(block) for block in blocks]
        if spec.body == "named":
            for number, block in enumerate(blocks):
                self.add_module(f"layer{number}", block)
        elif spec.body == "two parts":
            self.lower, self.upper = nn.ModuleList(blocks[:1]), nn.Sequential(*blocks[1:])
        else:
            self.blocks = nn.Sequential(*blocks) if spec.body == "sequential" else nn.ModuleList(blocks)
        self.between = nn.ModuleList(traps_at(spec, sizes, "between"))
        self.beside = nn.Linear(3 * prod(spec.patch), spec.width) if spec.second else nn.Identity()
        self.norm = nn.LayerNorm(spec.width)
        self.head = make_head(sizes, spec.head)

    def layers(self) -> list[nn.Module]:
        """The blocks in the order in which they run."""
        match self.spec.body:
            case "named":
                return [getattr(self, f"layer{number}") for number in range(self.spec.depth)]
            case "two parts":
                return [*self.lower, *self.upper]
            case "called twice":
                return [self.blocks[0], *self.blocks]
            case _:
                return [*self.blocks]

    def prepared(self, x: Tensor) -> Tensor:
        """Images as the embedding takes them."""
        if self.spec.images == "each normalised":
            axes = tuple(range(1, x.ndim))
            return (x - x.mean(dim=axes, keepdim=True)) / x.std(dim=axes, keepdim=True)
        return (x - 0.45) / 0.225 if self.spec.images == "constants" else x

    def stream(self, x: Tensor) -> Tensor:
        """Images to the tokens in front of the blocks, (B, N, C)."""
        return self.join(self.embed(self.prepared(x)))

    def second(self, x: Tensor) -> Tensor:
        """Another embedding of the patches, (B, N, C), zero for other tokens."""
        patches = F.unfold(x, self.spec.patch, stride=self.spec.patch).transpose(1, 2)
        return F.pad(self.beside(patches), (0, 0, self.spec.prefix, self.spec.suffix))

    def forward(self, images: Tensor) -> Any:
        x = early = self.stream(images)
        if self.spec.early:
            x = x * 0.5
        if self.spec.body == "sequence first":
            x = x.transpose(0, 1)
        for number, block in enumerate(self.layers()):
            x = block(x)
            if number == 0 and self.spec.body == "sequence first":
                x = self.added(x.transpose(0, 1), early, images).transpose(0, 1)
            elif number == 0:
                x = self.added(x, early, images)
        if self.spec.body == "sequence first":
            x = x.transpose(0, 1)
        return self.head(self.norm(x))

    def added(self, x: Tensor, early: Tensor, images: Tensor) -> Tensor:
        """What happens between the first two blocks."""
        for trap in self.between:
            x = trap(x)
        if self.spec.early:
            x = x + early
        return x + self.second(images) if self.spec.second else x

    def seen(self, images: Tensor, view: View, coarse: Tensor | None = None) -> Any:
        """The oracle: the output for the tokens of a view.

        Args:
            images: The images.
            view: Which tokens are left.
            coarse: Images in which each patch holds its cell at half size, for tokens of more than one patch.
        """
        stream = self.stream(images)
        single = (view.take > 0).sum(2, keepdim=True) == 1
        x = view.of(stream) if coarse is None else torch.where(single, view.of(stream), view.of(self.stream(coarse)))
        early = x
        if self.spec.early:
            x = x * 0.5
        first = view
        for number, block in enumerate(self.layers()):
            assert isinstance(block, Block | SequenceFirst)
            x, view = block.seen(x, view)
            if number == 0:
                for trap in self.between:
                    assert isinstance(trap, Trap)
                    x, view = trap.seen(x, view)
                if self.spec.early:
                    x = x + (early if view is first else view.of(stream))
                if (self.spec.second or self.spec.early) and coarse is not None:
                    raise UnjudgedError("a second embedding of coarse tokens")
                if self.spec.second:
                    x = x + view.of(self.second(images))
        return self.head.seen(self.norm(x), view)
