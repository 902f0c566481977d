"""Permutation: a wrong gather, and what uses the index of a token."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import papr_fx
from papr_fx import ops
from papr_fx.passes import prune_tokens

from ..models import Attention, Shape, ToyViT, toy_proposal
from .parts import PicksAToken, case_of, failures, with_attention


def next_sample(tokens: Tensor, keep: Tensor) -> Tensor:
    """Reads the rows of the next image, as flat indices with a wrong offset do."""
    return ops.gather_tokens(tokens.roll(1, 0), keep)


def off_by_one(tokens: Tensor, keep: Tensor) -> Tensor:
    return ops.gather_tokens(tokens, (keep + 1).clamp(max=tokens.shape[1] - 1))


def test_only_the_permutation_finds_a_gather_that_mixes_up_images(monkeypatch):
    """Other parts gather from one image. The control, which is measured against this part's error, has no room then."""
    monkeypatch.setattr(prune_tokens, "gather_tokens", next_sample)
    found = failures(case_of(ToyViT(Shape())))
    assert list(found) == ["permutation", "negative control"]
    assert "with all positions kept at `add`" in found["permutation"]


@pytest.mark.parametrize("wrong", [next_sample, off_by_one])
def test_a_wrong_gather_is_caught(wrong, monkeypatch):
    monkeypatch.setattr(prune_tokens, "gather_tokens", wrong)
    with pytest.raises(papr_fx.VerifyError, match="permutation"):
        papr_fx.transform(ToyViT(Shape()), toy_proposal(), 0.5)


class BiasedAttention(Attention):
    """A relative-position bias of zeros, as BEiT starts with, hidden in a module that takes any length."""

    def __init__(self, count: int) -> None:
        super().__init__(8, 2, fused=False)
        self.table = nn.Parameter(torch.zeros(2, count, count))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        n = q.shape[-2]
        return super().scores(q, k) + self.table[:, :n, :n]


class RebuiltPositions(Attention):
    """Positions that are computed by counting the tokens."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k) + torch.ones_like(k[..., 0]).cumsum(-1).unsqueeze(-2) / 8


class Windowed(ToyViT):
    """Pools windows of neighbours: any number of tokens is accepted in silence."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        pairs = F.max_pool1d(x.transpose(1, 2), 2).transpose(1, 2)
        return self.head(self.norm(pairs).mean(1))


class FaintlyPicksAToken(PicksAToken):
    def classify(self, x: Tensor) -> Tensor:
        return self.query.sum() + 1e-6 * super().classify(x)


USES_OF_AN_INDEX = {
    "zero bias table": lambda: with_attention(lambda: BiasedAttention(17)),
    "positions from the length": lambda: with_attention(lambda: RebuiltPositions(8, 2, False)),
    "head by index": lambda: PicksAToken(Shape()),
    "windows": lambda: Windowed(Shape()),
    "faint, and by index": lambda: FaintlyPicksAToken(Shape()),
}


@pytest.mark.parametrize("name", USES_OF_AN_INDEX)
def test_uses_of_an_index_are_caught(name):
    with pytest.raises(papr_fx.VerifyError, match="permutation: with all positions kept"):
        papr_fx.transform(USES_OF_AN_INDEX[name](), toy_proposal(), 0.5)


@pytest.mark.parametrize(("shift", "message"), [(-1, "permutation"), (1, "could not run")])
def test_a_wrong_prefix_is_caught(shift, message, monkeypatch):
    find_site = prune_tokens.find_site

    def shifted(graph, blocks, suffix=0):
        site = find_site(graph, blocks, suffix)
        return replace(site, rows=replace(site.rows, prefix=site.rows.prefix + shift))

    monkeypatch.setattr(prune_tokens, "find_site", shifted)
    with pytest.raises(papr_fx.VerifyError, match=message):
        papr_fx.transform(ToyViT(Shape(prefix=3, pool="cls")), toy_proposal(), 0.5)
