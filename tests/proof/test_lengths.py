"""Lengths: code that is right with all tokens only."""

import pytest
import torch
from torch import Tensor, nn

import papr_fx

from ..models import Attention, Shape, ToyViT, toy_proposal
from .parts import case_of, failures, with_attention


class Pool(nn.Module):
    """Averages all 17 tokens; if there are fewer, it weighs them by their index. It is not traced through."""

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.ones_like(x[..., :1]) if x.shape[1] == 17 else torch.ones_like(x[..., :1]).cumsum(1)
        return (x * weights).sum(1) / weights.sum(1)


class PoolsByLength(ToyViT):
    def __init__(self) -> None:
        super().__init__(Shape())
        self.norm = nn.Sequential(nn.LayerNorm(8), Pool())

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


class LengthAware(Attention):
    """Right with all 17 tokens; with fewer, it looks at their order."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        drift = torch.ones_like(k[..., 0]).cumsum(-1).unsqueeze(-2) / 8 if k.shape[-2] < 17 else 0.0
        return super().scores(q, k) + drift


def test_only_lengths_find_a_head_that_looks_at_order_when_tokens_are_few():
    found = failures(case_of(PoolsByLength()))
    assert list(found) == ["lengths"]
    assert "the output depends on their order" in found["lengths"]


def test_attention_that_looks_at_order_when_tokens_are_few_is_caught():
    with pytest.raises(papr_fx.VerifyError, match="lengths"):
        papr_fx.transform(with_attention(lambda: LengthAware(8, 2, False)), toy_proposal(), 0.5)
