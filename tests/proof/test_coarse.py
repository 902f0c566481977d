"""A coarse background: tokens that hold another cell, another content or another position."""

import pytest
import torch

import papr_fx
from papr_fx import ops
from papr_fx.passes import coarsen_background, gather_positions
from papr_fx.proof import coarse
from papr_fx.testing import check

from ..models import Attention, Shape, ToyViT, enliven, toy_proposal
from ..models.positioned import positioned
from .parts import case_of, failures

ODD = Shape(image=(10, 9), prefix=1)  # 5 x 3 patches


def first_patch(value, members, axes, rank, ends):
    """A table with an entry for each quad: that of its first patch, not the mean."""
    return ops.add_quads(value, members[:, :1].expand(-1, 4), axes, rank, ends)


def half_of_the_pairs(value, members, axes, rank, ends):
    """A table for pairs, averaged over the first patch of the one and all of the other."""
    return ops.add_quads(
        ops.add_quads(value, members[:, :1].expand(-1, 4), axes[:1], rank, ends), members, axes[1:], rank, ends
    )


FAULTS = {
    "content of the dense patches": (
        coarsen_background,
        "join_quads",
        lambda tokens, _, members, prefix: ops.join_quads(tokens, tokens, members, prefix),
    ),
    "other cells": (coarsen_background, "quad_members", lambda grid, like: ops.quad_members(grid, like).roll(1, 0)),
    "part of a cell": (coarsen_background, "quad_members", lambda grid, like: ops.quad_members(grid, like)[:, [0, 1, 1, 3]]),
    "a cell that is not halved": (coarsen_background, "halve_quads", lambda images, *_: images),
    "rows of the prefix": (
        coarsen_background,
        "join_quads",
        lambda tokens, halved, members, _: ops.join_quads(tokens, halved, members, 0),
    ),
    "a position of one patch": (gather_positions, "add_quads", first_patch),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_only_this_part_finds_wrong_cells(fault, monkeypatch):
    module, name, wrong = FAULTS[fault]
    monkeypatch.setattr(module, name, wrong)
    found = failures(case_of(positioned(ODD, "rotary"), background="coarse", narrow=False))
    assert list(found) == ["coarse background"]
    assert "something reads the image or a position elsewhere" in found["coarse background"]


def test_pairs_are_averaged_on_both_sides(monkeypatch):
    monkeypatch.setattr(gather_positions, "add_quads", half_of_the_pairs)
    assert list(failures(case_of(positioned(ODD, "bias"), background="coarse"))) == ["coarse background"]


@pytest.mark.parametrize(
    ("kind", "prefix"), [("rotary", 2), ("rotary, four axes", 0), ("bias", 2), ("numbered", 0), ("numbered patches", 2)]
)
def test_right_models_pass(kind, prefix):
    case = case_of(positioned(Shape(image=(10, 9), prefix=prefix), kind), background="coarse")
    assert not failures(case)
    assert coarse.tolerance(case) == (1e-9 if "numbered" not in kind else 100 * torch.finfo(torch.float32).eps)


def test_a_control_that_moves_nothing_is_reported(monkeypatch):
    monkeypatch.setattr(coarse, "with_wrong_cell", lambda keep, _: keep)
    found = failures(case_of(positioned(ODD, "bias"), background="coarse"))
    assert "with one cell taken for another, tokens move by only" in found["coarse background"]


def test_the_only_cell_is_taken_for_a_patch():
    """Not for a token in front of the patches, for which a table of patches has no entry."""
    case = case_of(positioned(Shape(image=(6, 6), prefix=3), "rotary"), background="coarse")  # 3 x 2 patches, 2 cells
    assert not failures(case)
    keep = ops.choose_quads(torch.rand(2, 3, 2), coarse.COARSE_SHARE, 3)
    assert (keep >= 9).sum(1).tolist() == [1, 1]
    assert (coarse.with_wrong_cell(keep, case.rewrite.choices[0].rows)[:, 3:] >= 3).all()


class Keyed(Attention):
    """Attention with a table of its keys. Its weights are summed by `einsum`."""

    def __init__(self, count: int) -> None:
        super().__init__(8, 2, False)
        self.table = torch.nn.Parameter(torch.zeros(1, 1, count, 4))

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = self.scores(q, k + self.table).softmax(-1)
        return self.proj(torch.einsum("bhqk,bhkd->bhqd", weights, v).transpose(1, 2).reshape(b, n, c))


def test_weights_of_one_block_are_not_looked_for_in_tables_of_the_next():
    model = ToyViT(ODD)
    for block in model.blocks:
        block.attn = Keyed(16)
    assert not failures(case_of(enliven(model), background="coarse"))


@pytest.mark.parametrize("z", [0.15, 0.99])
def test_users_can_check_their_models(z):
    found = check(positioned(ODD, "rotary"), toy_proposal(), z, background="coarse")
    assert found.hidden_keys < 1e-9 < found.corrupted


def test_users_see_a_wrong_position(monkeypatch):
    monkeypatch.setattr(gather_positions, "add_quads", first_patch)
    with pytest.raises(papr_fx.VerifyError, match="coarse background: kept tokens are off by"):
        check(positioned(ODD, "rotary"), toy_proposal(), 0.5, background="coarse", verify=False)
