"""Tables: which are computed alike, so that one gather serves them, and which only look so."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import papr_fx
from papr_fx import ops
from papr_fx.dataflow import positionwise

from ..models import Attention, Shape, ToyViT, enliven, images, toy_proposal
from ..oracles import with_hidden_keys

SHAPE = Shape()


class Tabled(Attention):
    """Adds a table, (n, C) with one row per token, that `make` computes."""

    def __init__(self, make) -> None:
        super().__init__(8, 2, True)
        self.make = make
        self.register_buffer("table", torch.randn(17, 8, generator=torch.Generator().manual_seed(0)), persistent=False)
        self.register_buffer("scale", torch.tensor(3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.make(self))


def model_of(*tables) -> ToyViT:
    model = enliven(ToyViT(SHAPE))
    for block, make in zip(model.blocks, tables, strict=True):
        block.attn = Tabled(make)
    shared = model.blocks[0].attn
    for block in model.blocks:
        block.attn.table, block.attn.scale = shared.table, shared.scale
    return model.double().eval()


def gathers(gm) -> int:
    return sum(node.target is ops.gather_positions for node in gm.graph.nodes)


@pytest.mark.parametrize(
    ("first", "second", "count"),
    [
        (lambda a: a.table * a.scale, lambda a: a.table * 1, 2),
        (lambda a: a.table + 0, lambda a: a.table + a.scale, 2),
        (lambda a: torch.normal(a.table, 1.0), lambda a: torch.normal(a.table, 1.0), 2),
        (lambda a: F.alpha_dropout(a.table, 0.5, True), lambda a: F.alpha_dropout(a.table, 0.5, True), 2),
        (lambda a: torch.poisson(a.table.abs()), lambda a: torch.poisson(a.table.abs()), 2),
        (lambda a: a.table.sin(), lambda a: a.table.sin(), 2),  # two buffers, though they hold the same tensor
    ],
)
def test_only_equal_expressions_share_a_gather(first, second, count):
    gm = papr_fx.transform(model_of(first, second), toy_proposal(), 0.5, verify=False)
    assert gathers(gm) == count


def test_tables_that_differ_by_a_number_are_not_taken_for_one():
    model = model_of(lambda a: a.table * a.scale, lambda a: a.table * 1)
    gm = papr_fx.transform(model, toy_proposal(), 0.5, verify=False)
    x = images(SHAPE, 3)
    (mask,) = papr_fx.keep_masks(gm, x).values()
    assert torch.allclose(gm(x), with_hidden_keys(model, mask, x), atol=1e-12)


def test_faults_of_this_project_are_not_verdicts(monkeypatch):
    """A model may raise anything; what the code around it raises is a bug and must surface."""

    def broken(tensor, layout):
        raise KeyError("a bug")

    monkeypatch.setattr(positionwise, "_gathered", broken)
    with pytest.raises(KeyError, match="a bug"):
        papr_fx.transform(
            torch.nn.Sequential(ToyViT(SHAPE)), toy_proposal(), 0.5, mode="pixels", example_input=torch.zeros(1, 3, 8, 12)
        )
