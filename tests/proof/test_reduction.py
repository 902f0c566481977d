"""Merging: what counts tokens, and what ignores their sizes."""

import pytest
from torch import Tensor

import papr_fx
from papr_fx.passes import reduce_tokens

from ..models import Shape, ToyViT, toy_proposal
from .parts import case_of, failures

MERGE = papr_fx.Merge(2, "all")


class Summed(ToyViT):
    """Its head sums tokens: the sum of fewer, merged ones is another."""

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).sum(1))


def test_only_merging_finds_a_sum_over_tokens():
    found = failures(case_of(Summed(Shape()), merge=MERGE))
    assert list(found) == ["merging"]
    assert "something counts tokens" in found["merging"]
    assert not failures(case_of(Summed(Shape())))


def test_only_merging_finds_a_mean_that_ignores_sizes(monkeypatch):
    monkeypatch.setattr(reduce_tokens, "mean_by_size", lambda x, axis, sizes, **options: x.mean(axis))
    assert list(failures(case_of(ToyViT(Shape()), merge=MERGE))) == ["merging"]


def test_a_sum_over_tokens_is_caught():
    with pytest.raises(papr_fx.VerifyError, match="merging: the output is off"):
        papr_fx.transform(Summed(Shape()), toy_proposal(), 0.5, merge=MERGE)
