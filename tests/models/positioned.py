"""Toy ViTs whose attentions use the positions of their tokens: rotary angles and biases."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .vits import Attention, Shape, ToyViT


class Rotary(Attention):
    """Rotates queries and keys of the patches, which come after the prefix tokens, by a table (n, D)."""

    def __init__(self, shape: Shape, *, late: bool) -> None:
        super().__init__(8, 2, True)
        self.prefix = shape.prefix
        self.late = late
        self.register_buffer("angles", torch.linspace(0, 3, shape.grid[0] * shape.grid[1]).outer(torch.arange(1.0, 5.0)))

    def turn(self, x: Tensor) -> Tensor:
        first, rest = x[:, :, : self.prefix], x[:, :, self.prefix :]
        cosine, sine = self.angles.cos(), self.angles.sin()
        if self.late:
            cosine, sine = cosine[None, None], sine[None, None]
        return torch.cat([first, rest * cosine + rest.flip(-1) * sine], dim=2)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v)
        return self.proj(mixed.transpose(1, 2).reshape(b, n, c))


class Biased(Attention):
    """Adds a bias for each pair of tokens, from one table per head."""

    def __init__(self, shape: Shape, *, fused: bool) -> None:
        super().__init__(8, 2, fused)
        count = shape.prefix + shape.grid[0] * shape.grid[1]
        self.table = nn.Parameter(torch.randn(self.heads, 2 * count))
        self.register_buffer("index", (torch.arange(count)[:, None] - torch.arange(count)) % (2 * count))

    def bias(self) -> Tensor:
        return self.table[:, self.index].unsqueeze(0)  # (1, H, N, N)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias())
        else:
            mixed = (self.scores(q, k) + self.bias()).softmax(dim=-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(b, n, c))


class Numbered(Attention):
    """Computes rotary angles in forward from the number of tokens: all of them, or the patches only."""

    def __init__(self, prefix: int) -> None:
        super().__init__(8, 2, True)
        self.prefix = prefix

    def turn(self, x: Tensor) -> Tensor:
        first, rest = x[:, :, : self.prefix], x[:, :, self.prefix :]
        numbers = torch.arange(x.shape[2] - self.prefix if self.prefix else x.shape[2], device=x.device)
        angles = (numbers * 0.4).unsqueeze(1) * torch.arange(1, 5, device=x.device)
        return torch.cat([first, rest * angles.cos() + rest.flip(-1) * angles.sin()], dim=2)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v)
        return self.proj(mixed.transpose(1, 2).reshape(b, n, c))


def positioned(shape: Shape, kind: str) -> ToyViT:
    build = {
        "rotary": lambda: Rotary(shape, late=False),
        "rotary, four axes": lambda: Rotary(shape, late=True),
        "bias": lambda: Biased(shape, fused=True),
        "bias on scores": lambda: Biased(shape, fused=False),
        "numbered": lambda: Numbered(0),
        "numbered patches": lambda: Numbered(shape.prefix),
    }[kind]
    model = ToyViT(shape)
    for block in model.blocks:
        block.attn = build()
    return model
