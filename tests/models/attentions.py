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
    """Attention that is written out, in a way that one call would change.

    Args:
        kind: What is done: "product" of a sum, "dropout", "told" where another part reads its weights, or "changed" where the
            keys change in place between the two products.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(8, 2, False)
        self.kind = kind
        self.drop = nn.Dropout(0.3 if kind == "dropout" else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1)
        if self.kind == "product":
            scores = (scores + k.sum(-1).unsqueeze(2)) * 0.3
        weights = self.drop(scores.softmax(-1))
        if self.kind == "changed":
            k.mul_(0.3)
        mixed = weights @ v
        if self.kind == "told":
            mixed = mixed * weights.sum(-1, keepdim=True)
        return self.proj(mixed.transpose(1, 2).reshape(b, n, c))


class Masked(Attention):
    """A mask that follows from the tokens themselves."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, k.sum(-1).unsqueeze(2))
        return self.proj(mixed.transpose(1, 2).reshape(b, n, c))


class Numbered(Attention):
    """Multiplies its tokens by whole numbers, one for each."""

    def forward(self, x: Tensor) -> Tensor:
        numbers = torch.arange(x.shape[1], device=x.device)
        return super().forward(x * numbers.unsqueeze(1))


class Heads(nn.Module):
    """Attention of torch, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(x, x, x, need_weights=False)[0]


def with_attention(make: Callable[[], nn.Module], **shape: Any) -> nn.Module:
    """A ViT of some attention, without dropout elsewhere."""
    model = ToyViT(Shape(**shape))
    for block in model.blocks:
        block.attn = make()
        block.mlp[2].p = 0.0
    return enliven(model)
