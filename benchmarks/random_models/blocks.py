"""Transformer blocks: attention and an MLP, in several orders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention, LibraryAttention
from .merging import merged
from .positions import Sizes
from .spec import Spec
from .traps import KINDS, Trap
from .views import View


class Mlp(nn.Module):
    """Two layers for each token."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        hidden = width + 4
        if kind == "convolutions":
            self.first, self.last = nn.Conv1d(width, hidden, 1), nn.Conv1d(hidden, width, 1)
        else:
            self.first, self.last = nn.Linear(width, 2 * hidden if kind == "gated" else hidden), nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(hidden) if kind == "normalised" else nn.Identity()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "convolutions":
            return self.last(F.gelu(self.first(x.transpose(1, 2)))).transpose(1, 2)
        if self.kind == "gated":
            gate, value = self.first(x).chunk(2, dim=-1)
            return self.last(F.silu(gate) * value)
        return self.last(self.drop(self.norm(F.gelu(self.first(x)))))


class Block(nn.Module):
    """Attention and an MLP, with a norm before or behind them, or both beside each other."""

    def __init__(self, sizes: Sizes, spec: Spec, inside: list[Trap]) -> None:
        super().__init__()
        self.order = spec.block
        if spec.attention.startswith("library"):
            self.attn = LibraryAttention(sizes, batch_first=spec.attention == "library")
        else:
            self.attn = Attention(sizes, spec.project, spec.attention, spec.inner)
        self.norm1, self.norm2 = nn.LayerNorm(sizes.width), nn.LayerNorm(sizes.width)
        self.mlp = Mlp(sizes.width, spec.mlp)
        self.scale = nn.Parameter(torch.zeros(sizes.width)) if spec.scale else 1.0
        self.inside = nn.ModuleList(inside)
        self.reversed = spec.reversed_attention

    def attend(self, x: Tensor) -> Tensor:
        """The branch of the attention, which may run on tokens in reverse order."""
        return self.attn(x.flip(1)).flip(1) if self.reversed else self.attn(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "parallel":
            normed = self.norm1(x)
            return x + self.attend(normed) * self.scale + self.mlp(normed)
        if self.order == "post":
            x = self.norm1(x + self.attend(x))
            for trap in self.inside:
                x = trap(x)
            return self.norm2(x + self.mlp(x))
        x = x + self.scale * self.attend(self.norm1(x))
        for trap in self.inside:
            x = trap(x)
        return x + self.scale * self.mlp(self.norm2(x))

    def seen(self, x: Tensor, view: View) -> tuple[Tensor, View]:
        """The oracle."""
        source = self.norm1(x) if self.order != "post" else x
        branch = self.attn.seen(source.flip(1), view.flipped()).flip(1) if self.reversed else self.attn.seen(source, view)
        if self.order == "parallel":
            return view.add(self.mlp.last, x + branch * self.scale, self.mlp(source)), view
        x, view = merged(x + branch * (1.0 if self.order == "post" else self.scale), self.attn.keys(source), view)
        x = self.norm1(x) if self.order == "post" else x
        for trap in self.inside:
            assert isinstance(trap, Trap)
            x, view = trap.seen(x, view)
        if self.order == "post":
            return self.norm2(view.add(self.mlp.last, x, self.mlp(x))), view
        return view.add(self.mlp.last, x, self.scale * self.mlp(self.norm2(x))), view


def traps_at(spec: Spec, sizes: Sizes, place: str) -> list[Trap]:
    """The traps at a place: "inside" the second block, or "between" the first two."""
    return [KINDS[name](sizes) for name, _, where in (trap.partition(":") for trap in spec.traps) if where == place]
