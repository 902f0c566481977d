"""Models whose last rows alone are read, in which a row more or less is not all that it takes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .vits import Attention, Shape, ToyViT, enliven


class NormedMlp(nn.Module):
    """An MLP with a norm whose statistics follow all tokens of the batch in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x).transpose(1, 2)).transpose(1, 2)
        return self.last(F.gelu(hidden))


class BatchNormed(ToyViT):
    """A head on the class token, and such an MLP in the last block."""

    def __init__(self) -> None:
        super().__init__(Shape(pool="cls"))
        self.blocks[-1].mlp = NormedMlp()
        enliven(self)


class PerToken(ToyViT):
    """A head on the class token, which is divided by the number of tokens."""

    def classify(self, x: Tensor) -> Tensor:
        return super().classify(self.norm(x) / x.shape[1])


class Shared(Attention):
    """The same values for queries and keys, which are clamped in place as queries."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        both, v = self.qkv(x)[..., :c], self.qkv(x)[..., c : 2 * c]
        q = both.unflatten(-1, (2, -1)).transpose(1, 2).clamp_(min=-0.3)
        k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (both, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class Sparse(Attention):
    """Reads every second output of its first layer."""

    def __init__(self) -> None:
        super().__init__(8, 2, True)
        self.qkv = nn.Linear(8, 48)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c)[..., ::2].permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class Shuffled(Attention):
    """The outputs of its first layer in another order."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (part.unflatten(-1, (2, -1)) for part in self.qkv(x)[..., [0, 1, 3, 2, *range(4, 24)]].chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(mixed.transpose(1, 2).reshape(b, n, c))
