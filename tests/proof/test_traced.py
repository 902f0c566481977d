"""Tracing: what was frozen into the graph."""

import math

import pytest
import torch
from torch import Tensor

import papr_fx
from papr_fx.planning import token_planner

from ..models import Shape, ToyViT, toy_proposal
from .parts import case_of, failures


class FrozenAtOne(ToyViT):
    """Doubles its tokens for a batch of one."""

    def tokens(self, x: Tensor) -> Tensor:
        return super().tokens(x) * (2 if x.shape[0] == 1 else 1)


class FrozenBatch(ToyViT):
    def tokens(self, x: Tensor) -> Tensor:
        batch = int(x.shape[0])
        first = self.first.expand(batch, -1, -1).contiguous()
        return torch.cat([first, self.patches(x)[:batch]], dim=1) + self.pos if batch == 2 else super().tokens(x) * 2


def test_only_tracing_finds_a_branch_on_the_batch_size(monkeypatch):
    """The part compares a batch of one: the others compare the graph with itself there."""
    monkeypatch.setattr(token_planner, "check_batch_reads", lambda *_: None)
    found = failures(case_of(FrozenAtOne(Shape())))
    assert list(found) == ["tracing"]
    assert "the graph of FrozenAtOne differs from the model by" in found["tracing"]


@pytest.mark.parametrize("make", [FrozenAtOne, FrozenBatch])
def test_frozen_batch_sizes_are_caught(make):
    with pytest.raises(papr_fx.TraceError, match="reads `eq`"):
        papr_fx.transform(make(Shape()), toy_proposal(), 0.5)


class CountsTokens(ToyViT):
    """Reads the number of tokens as a Python number after the blocks, where pruning changes it."""

    def __init__(self, read) -> None:
        super().__init__(Shape())
        self.read = read

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).sum(1) / self.read(x))


READS = {
    "index": lambda x: len(range(x.shape[1])),
    "branch": lambda x: 1 if x.shape[1] > 12 else 3,
    "min": lambda x: min(x.shape[1], 12),
    "loop": lambda x: sum(1 for _ in x[0]),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_a_number_of_tokens_frozen_by_tracing_is_refused(read, verify):
    with pytest.raises(papr_fx.NoSiteError, match="reads .* as a Python number"):
        papr_fx.transform(CountsTokens(read), toy_proposal(), 0.5, verify=verify)


@pytest.mark.parametrize(
    "read",
    [
        *(lambda x: x.shape[1], lambda x: x.ndim, lambda x: int(x.shape[2]), lambda x: math.sqrt(x.shape[1])),
        *(lambda x: int(x.shape[1]), lambda x: float(x.shape[1]), lambda x: round(x.shape[1] / 3), lambda x: abs(-x.shape[1])),
        *(lambda x: divmod(x.shape[1], 4)[0], lambda x: int("3") * float(2) if isinstance(x.ndim, int) else None),
        lambda x: len(x[0]),
    ],
)
def test_sizes_that_stay_in_the_graph_are_not(read):
    papr_fx.transform(CountsTokens(read), toy_proposal(), 0.5)
