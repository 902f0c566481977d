"""Attentions as users write them, with positions or without; `seen` computes each in one plain way for the oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .positions import HEADS, Sizes, inner_positions
from .views import View


def attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float, view: View) -> Tensor:
    """Attention in one plain way, (B, N, C); merged tokens weigh more."""
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5 + bias
    if view.sizes is not None and view.proportional:
        scores = scores + view.sizes.log()[:, None, None]
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    mixed = torch.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdim=True), v)
    return mixed.permute(0, 2, 1, 3).flatten(2)


UNUSUAL = ("causal", "linear", "softmax over queries", "rectified", "extra keys", "cosine", "talking heads")


class Attention(nn.Module):
    """Attention over tokens (B, N, C), written in one of several ways."""

    def __init__(self, sizes: Sizes, project: str, mix: str, positions: str) -> None:
        super().__init__()
        width = sizes.width
        self.project, self.mix = project, mix
        self.positions = inner_positions(positions, sizes)
        if project == "separate":
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        elif project == "keys and values":
            self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        elif project == "convolution":
            self.qkv = nn.Conv1d(width, 3 * width, 1)
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.drop = nn.Dropout(0.1)
        self.extra = nn.Parameter(torch.zeros(2, 1, HEADS, 1, sizes.head)) if mix == "extra keys" else None
        self.heads = nn.ModuleList(nn.Linear(HEADS, HEADS) for _ in range(2 if mix == "talking heads" else 0))
        self.proj = nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, N, D)."""
        b, n, c = x.shape
        if self.project == "qkv":
            q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
            return q, k, v
        if self.project == "separate":
            parts = self.q(x), self.k(x), self.v(x)
        elif self.project == "keys and values":
            k, v = self.kv(x).reshape(b, n, 2, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
            return self.q(x).view(b, n, HEADS, -1).transpose(1, 2), k, v
        elif self.project == "convolution":
            parts = self.qkv(x.transpose(1, 2)).transpose(1, 2).chunk(3, dim=-1)
        else:
            parts = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (part.reshape(b, n, HEADS, c // HEADS).transpose(1, 2) for part in parts)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.split(x)
        q, k, v = self.positions(q, k, v)
        bias = self.positions.bias(x)
        scale = q.shape[-1] ** -0.5
        if self.mix in UNUSUAL:
            mixed = self.unusual(q, k, v, bias)
        elif self.mix == "fused":
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        elif self.mix == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q * scale, k)
            mixed = torch.einsum("bhqk,bhkd->bhqd", self.weights(scores, bias), v)
        elif self.mix == "scaled queries":
            mixed = self.weights((q * scale) @ k.transpose(-2, -1), bias) @ v
        else:
            mixed = torch.matmul(self.weights(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, bias), v)
        return self.proj(mixed.transpose(1, 2).reshape(b, n, c))

    def unusual(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Attention that is not the usual one, (B, H, N, D)."""
        scale = q.shape[-1] ** -0.5
        match self.mix:
            case "causal":
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            case "linear":
                q, k = F.elu(q) + 1, F.elu(k) + 1
                return q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(dim=2).unsqueeze(-1))
            case "softmax over queries":
                return (q @ k.transpose(-2, -1) * scale).softmax(dim=-2) @ v
            case "rectified":
                return F.relu(q @ k.transpose(-2, -1) * scale) @ v / 5
            case "extra keys":
                assert self.extra is not None
                key, value = (part.expand(q.shape[0], -1, -1, -1) for part in self.extra)
                return F.scaled_dot_product_attention(q, torch.cat([key, k], dim=2), torch.cat([value, v], dim=2))
            case "cosine":
                scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
                return self.weights(scores * 4, bias) @ v
            case _:
                before, after = self.heads
                scores = before((q @ k.transpose(-2, -1) * scale).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
                return after(scores.softmax(dim=-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v

    def weights(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        """Attention weights."""
        if bias is not None:
            scores = scores.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else scores + bias
        return self.drop(F.softmax(scores, dim=-1))

    def seen(self, x: Tensor, view: View) -> Tensor:
        """The oracle."""
        if self.mix in UNUSUAL:
            return self.proj(self.seen_unusual(x, view).transpose(1, 2).flatten(2))
        q, k, v = self.positions.seen(*self.split(x), view)
        return self.proj(attended(q, k, v, self.positions.seen_bias(view), view))

    def seen_unusual(self, x: Tensor, view: View) -> Tensor:
        """The oracle of attention that is not the usual one, (B, H, N, D)."""
        q, k, v = self.positions.seen(*self.split(x), view)
        if self.mix == "causal":
            count = self.positions.count
            hidden = torch.ones(count, count, dtype=x.dtype).triu(1) * -1e4
            return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + view.pairs(hidden[None])).softmax(-1) @ v
        if self.mix == "softmax over queries":
            view.need_all("a softmax over queries")
        bias = self.positions.seen_bias(view)
        return self.unusual(q, k, v, bias if isinstance(bias, Tensor) else None)

    def keys(self, x: Tensor) -> Tensor:
        """The keys (B, H, N, D) of attention without positions."""
        return self.split(x)[1]


class LibraryAttention(nn.Module):
    """`nn.MultiheadAttention`, batch first or sequence first."""

    def __init__(self, sizes: Sizes, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.inner = nn.MultiheadAttention(sizes.width, HEADS, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        if self.batch_first:
            return self.inner(x, x, x, need_weights=False)[0]
        x = x.transpose(0, 1)
        return self.inner(x, x, x)[0].transpose(0, 1)

    def seen(self, x: Tensor, view: View) -> Tensor:
        """The oracle."""
        return self.inner.out_proj(attended(*self.split(x), 0.0, view))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, N, D)."""
        parts = F.linear(x, self.inner.in_proj_weight, self.inner.in_proj_bias).chunk(3, -1)
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in parts)
        return q, k, v

    def keys(self, x: Tensor) -> Tensor:
        """The keys (B, H, N, D)."""
        return self.split(x)[1]
