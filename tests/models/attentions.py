"""Attentions in which a wrong rewrite would go unseen if nobody looked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .vits import Attention, Shape, ToyViT, enliven


class PairBiased(Attention):
    """Adds a bias for each pair of tokens."""

    def __init__(self, count: int) -> None:
        super().__init__(8, 2, True)
        self.bias = nn.Parameter(torch.randn(1, 2, count, count))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, self.bias).transpose(1, 2).reshape(b, n, c))


class Causal(Attention):
    """Sees the tokens before each token alone."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(mixed.transpose(1, 2).reshape(b, n, c))


class Separate(Attention):
    """Queries, keys and values by one layer, in an order of its own, and a residual in place."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        k, v, q = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        return self.proj(mixed.transpose(1, 2).reshape(b, n, c))


class Interleaved(Attention):
    """Queries, keys and values of a head lie side by side, channel by channel."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 2, c // 2, 3).permute(4, 0, 2, 1, 3)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class Written(Attention):
    """Attention that is written out: a sum of scores and biases, which is multiplied, or a softmax over queries."""

    def __init__(self, kind: str) -> None:
        super().__init__(8, 2, False)
        self.kind = kind
        self.bias = nn.Parameter(torch.randn(1, 2, 1, 1))
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) + self.bias
        weights = (scores * 0.5).softmax(-2 if self.kind == "queries" else -1)
        return self.proj((self.drop(weights) @ v).transpose(1, 2).reshape(b, n, c))


def with_attention(make: Callable[[], nn.Module], **shape: Any) -> nn.Module:
    """A ViT of some attention."""
    model = ToyViT(Shape(**shape))
    for block in model.blocks:
        block.attn = make()
    return enliven(model)
