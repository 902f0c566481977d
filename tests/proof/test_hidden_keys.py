"""Hidden keys: tokens that meet outside of attention."""

import pytest
import torch
from torch import nn

import papr_fx

from ..models import Attention, Shape, ToyViT, enliven, toy_proposal
from .parts import case_of, failures


class Mixing(nn.Module):
    """A block of an MLP-Mixer: tokens meet in a matrix of their number."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.matrix = nn.Parameter(torch.randn(count, count))
        self.layer = nn.Sequential(nn.Linear(8, 8))

    def forward(self, x):
        return x + self.layer(self.matrix @ self.norm(x))


class Static(Attention):
    """Attention plus weights that do not depend on the image: normalised over all tokens, they cannot be cut."""

    def __init__(self, count: int) -> None:
        super().__init__(8, 2, False)
        self.table = nn.Parameter(torch.randn(1, 2, count, count))

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = self.scores(q, k).softmax(-1) + self.table.softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


def mixer() -> ToyViT:
    model = ToyViT(Shape(prefix=0))
    model.blocks = nn.ModuleList(Mixing(16) for _ in range(2))
    return enliven(model)


def static() -> ToyViT:
    model = ToyViT(Shape())
    for block in model.blocks:
        block.attn = Static(17)
    return enliven(model)


@pytest.mark.parametrize(("make", "message"), [(mixer, "no attention over the 16 tokens"), (static, "`add_6` are off by")])
def test_only_hidden_keys_find_tokens_that_meet_outside_of_attention(make, message):
    found = failures(case_of(make()))
    assert list(found) == ["hidden keys"]
    assert message in found["hidden keys"]


@pytest.mark.parametrize(
    ("make", "message"),
    [(mixer, "hidden keys: no attention over the 16 tokens"), (static, "hidden keys: the kept tokens of `add_6` are off")],
)
def test_tokens_that_meet_outside_of_attention_are_caught(make, message):
    with pytest.raises(papr_fx.VerifyError, match=message):
        papr_fx.transform(make(), toy_proposal(), 0.5)
