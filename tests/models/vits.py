"""A user's own vision transformer in many shapes, and a proposal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of a toy ViT. `embed`: conv, linear or unfold; `pool`: cls, avg, patches (average without prefix) or map."""

    image: tuple[int, int] = (8, 12)
    patch: tuple[int, int] = (2, 3)
    prefix: int = 1
    depth: int = 2
    pool: str = "avg"
    embed: str = "conv"
    fused: bool = True

    @property
    def grid(self) -> tuple[int, int]:
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v) if self.fused else self.scores(q, k).softmax(dim=-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = attention
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ToyViT(nn.Module):
    """A ViT as users write them: (B, 3, H, W) to (B, 7)."""

    def __init__(self, shape: Shape, width: int = 8) -> None:
        super().__init__()
        self.shape = shape
        self.image_size = shape.image
        rows, columns = shape.grid
        ph, pw = shape.patch
        self.proj = nn.Conv2d(3, width, shape.patch, shape.patch) if shape.embed == "conv" else nn.Linear(3 * ph * pw, width)
        self.first = nn.Parameter(torch.zeros(1, shape.prefix, width))
        self.pos = nn.Parameter(torch.zeros(1, shape.prefix + rows * columns, width))
        self.blocks = nn.ModuleList(Block(width, Attention(width, 2, shape.fused)) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.head = nn.Linear(width, 7)
        enliven(self)

    def patches(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, n, C)."""
        ph, pw = self.shape.patch
        if self.shape.embed == "conv":
            return self.proj(x).flatten(2).transpose(1, 2)
        if self.shape.embed == "unfold":
            return self.proj(F.unfold(x, (ph, pw), stride=(ph, pw)).transpose(1, 2))
        b, c, h, w = x.shape
        cut = x.reshape(b, c, h // ph, ph, w // pw, pw).permute(0, 2, 4, 1, 3, 5)
        return self.proj(cut.reshape(b, (h // ph) * (w // pw), c * ph * pw))

    def tokens(self, x: Tensor) -> Tensor:
        return torch.cat([self.first.expand(x.shape[0], -1, -1), self.patches(x)], dim=1) + self.pos

    def classify(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        match self.shape.pool:
            case "cls":
                return self.head(x[:, 0])
            case "patches":
                return self.head(x[:, self.shape.prefix :].mean(dim=1))
            case "map":
                weights = (self.query @ x.transpose(1, 2)).softmax(dim=-1)  # (B, 1, N)
                return self.head((weights @ x)[:, 0])
            case _:
                return self.head(x.mean(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.classify(x)


class SinCos(ToyViT):
    """Positions computed in forward."""

    def __init__(self) -> None:
        super().__init__(Shape())

    def tokens(self, x: Tensor) -> Tensor:
        patches = self.patches(x)
        place = torch.arange(patches.shape[1], device=x.device, dtype=x.dtype)
        waves = torch.outer(place, 0.3 ** torch.arange(4, device=x.device, dtype=x.dtype))
        patches = patches + torch.cat([waves.sin(), waves.cos()], dim=1)
        return torch.cat([self.first.expand(x.shape[0], -1, -1), patches], dim=1)


class BatchNormStem(ToyViT):
    """Normalises its images, so it has buffers."""

    def __init__(self) -> None:
        super().__init__(Shape())
        self.stem = nn.BatchNorm2d(3)

    def patches(self, x: Tensor) -> Tensor:
        return super().patches(self.stem(x))


def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Redraws every parameter at a scale at which faults show: with default initialisations a model is nearly linear."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 and parameter.shape[0] > 1 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 1.5 / fan**0.5)
    return model


def toy_proposal(seed: int = 1) -> nn.Sequential:
    """A ConvNet without a head. Its map has the resolution of the images, so no two scores tie."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 5, 3, padding=1))


def images(shape: Shape, batch: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn((batch, 3, *shape.image), generator=torch.Generator().manual_seed(seed), dtype=dtype)
