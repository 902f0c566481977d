"""A small model of shifted windows, whose attention is written out in whatever way a test says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .vits import enliven

Scores = Callable[["WindowAttention", Tensor, Tensor], Tensor]
Weights = Callable[["WindowAttention", Tensor], Any]


def swin_scores(own: WindowAttention, q: Tensor, k: Tensor) -> Tensor:
    """As Swin has it: a bias of positions for all windows, and a mask for each window of an image."""
    scores = (q * 0.7) @ k.transpose(-2, -1) + own.bias
    windows, heads, count = own.mask.shape[0], q.shape[1], q.shape[2]
    scores = scores.view(-1, windows, heads, count, count) + own.mask.unsqueeze(1).unsqueeze(0)
    return scores.view(-1, heads, count, count)


def plain_weights(own: WindowAttention, scores: Tensor) -> Tensor:
    return own.dropout(scores.softmax(-1))


def over_queries(own: WindowAttention, scores: Tensor) -> Tensor:
    """A softmax over queries, which no call of attention does."""
    return scores.softmax(-2)


class WindowAttention(nn.Module):
    """Attention of two heads in windows (B * 4, 4, 6)."""

    def __init__(self, scores: Scores = swin_scores, weights: Weights = plain_weights) -> None:
        super().__init__()
        self.scores, self.weights = scores, weights
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)
        self.bias = nn.Parameter(torch.zeros(1, 2, 4, 4))
        self.temperature = nn.Parameter(torch.ones(2, 1, 1))
        self.mask = nn.Parameter(torch.zeros(4, 4, 4))
        self.softmax, self.dropout, self.identity = nn.Softmax(dim=-1), nn.Dropout(0.0), nn.Identity()
        self.rated = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], 4, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)  # (B * 4, 2, 4, 3)
        mixed = self.weights(self, self.scores(self, q, k)) @ v
        return self.out(mixed.transpose(1, 2).reshape(x.shape[0], 4, 6))


class WindowBlock(nn.Module):
    """A residual branch of attention in windows of 2 x 2 positions, and one of an MLP."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.norm, self.mlp = nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        windows = x.reshape(x.shape[0], 2, 2, 2, 2, 6).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 6)
        mixed = self.attention(windows).reshape(x.shape[0], 2, 2, 2, 2, 6)
        x = x + mixed.permute(0, 1, 3, 2, 4, 5).reshape(x.shape)
        return x + self.mlp(self.norm(x))


class ToyWindows(nn.Module):
    """Images (B, 3, 8, 8) to grids (B, 4, 4, 6), blocks on them, and five classes. Lively, in eval mode, in float64."""

    img_size = 8

    def __init__(self, *attentions: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 2, 2)
        self.blocks = nn.Sequential(*(WindowBlock(attention) for attention in attentions or (WindowAttention(),)))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 5)
        enliven(self).double().eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x).permute(0, 2, 3, 1))  # (B, 4, 4, 6)
        return self.head(self.norm(x).mean((1, 2)))
