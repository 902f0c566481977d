"""The tools for users' own suites: they pass what is right and fail what is not."""

import pytest
import timm
import torch
from torch import nn

import papr_fx
from papr_fx import ops, testing
from papr_fx.passes import prune_tokens, splice_proposal
from papr_fx.planning import token_planner
from papr_fx.proof.faults import NOTHING
from papr_fx.tracing.numerics import relative_error

from .models import Attention, Shape, ToyViT, images, toy_proposal
from .models.windows import ToyWindows
from .oracles import attention_without


def test_check_leaves_the_model_alone():
    model = ToyViT(Shape()).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = testing.check(model, toy_proposal(), 0.5)
    assert found.hidden_keys < 1e-12 < 1e-4 < found.corrupted
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_check_refuses_what_transform_refuses():
    with pytest.raises(papr_fx.PaprError):
        testing.check(nn.Linear(3, 3), toy_proposal(), 0.5)


def test_hidden_keys_catch_a_gather_that_loses_a_token(monkeypatch):
    """Even with the proof switched off."""
    monkeypatch.setattr(
        prune_tokens, "gather_tokens", lambda tokens, keep: ops.gather_tokens(tokens, keep.clone().fill_(0) + keep[:, :1])
    )
    with pytest.raises(papr_fx.VerifyError, match="hidden keys"):
        testing.check(ToyViT(Shape()), toy_proposal(), 0.5, verify=False)


def test_check_refuses_a_keep_ratio_of_one():
    with pytest.raises(papr_fx.ArgumentError, match="z must be below 1"):
        testing.check(ToyViT(Shape()), toy_proposal(), 1.0)


class NoAttention(ToyViT):
    def __init__(self) -> None:
        super().__init__(Shape())
        for block in self.blocks:
            block.attn = nn.Linear(8, 8)


def test_hidden_keys_say_when_they_see_nothing():
    with pytest.raises(papr_fx.VerifyError, match="no attention over the 17 tokens"):
        testing.check(NoAttention(), toy_proposal(), 0.5, verify=False)


def test_pruned_models_equal_attention_cut_by_hand():
    """The same that `check` says, by an oracle that shares no code with it: a class token reads the kept tokens only."""
    model = ToyViT(Shape(pool="cls")).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    x = images(model.shape, 3)
    (mask,) = papr_fx.keep_masks(gm, x).values()
    hidden = torch.cat([torch.zeros(3, 1, dtype=torch.bool), ~mask.flatten(1)], dim=1)
    with attention_without(hidden) as calls:
        assert relative_error(gm(x), model(x)) < 1e-12
    assert calls.seen == 2
    corrupt = hidden.clone()
    corrupt[:, 1 + mask[0].flatten().nonzero()[0, 0]] = True
    with attention_without(corrupt):
        assert relative_error(gm(x), model(x)) > 1e-4


def test_check_refuses_a_model_that_keeps_other_positions(monkeypatch):
    def others(gm, x):
        return {grid: mask.flip(1, 2) for grid, mask in papr_fx.keep_masks(gm, x).items()}

    monkeypatch.setattr(testing, "keep_masks", others)
    with pytest.raises(papr_fx.VerifyError, match="choice: the model does not keep"):
        testing.check(ToyViT(Shape()), toy_proposal(), 0.5)


class FrozenAtThree(ToyViT):
    """Doubles its tokens for a batch of three: a branch that a graph does not hold."""

    def tokens(self, x):
        return super().tokens(x) * (2 if x.shape[0] == 3 else 1)


def test_check_compares_the_dense_graph_with_the_model(monkeypatch):
    monkeypatch.setattr(token_planner, "check_batch_reads", lambda *_: None)  # which refuses such a branch
    with pytest.raises(papr_fx.VerifyError, match="z=1: the traced model differs"):
        testing.check(FrozenAtThree(Shape(pool="cls")), toy_proposal(), 0.5, verify=False)


class IgnoresPatches(ToyViT):
    """Its attention is zero: tokens do not depend on each other."""

    def __init__(self) -> None:
        super().__init__(Shape())
        for block in self.blocks:
            block.attn = Zero(8, 2, fused=True)


class Zero(Attention):
    def forward(self, x):
        return super().forward(x) * 0


def test_check_refuses_to_say_anything_where_a_wrong_position_does_not_show():
    with pytest.raises(papr_fx.VerifyError, match="hidden keys: one wrong position moves the result by only 0.0e"):
        testing.check(IgnoresPatches(), toy_proposal(), 0.5, verify=False)


@pytest.mark.parametrize("output", ["logits", "features"])
def test_check_sees_a_position_that_is_kept_twice(output, monkeypatch):
    def twice(psm, z, prefix=0):
        keep = ops.top_positions(psm, z, prefix)
        return torch.cat([keep[:, :-1], keep[:, -2:-1]], dim=1)

    monkeypatch.setattr(splice_proposal, "top_positions", twice)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64, num_classes=3)
    with pytest.raises(papr_fx.VerifyError, match="choice"):
        testing.check(model, toy_proposal(), 0.5, verify=False, output=output)


@pytest.mark.parametrize(
    ("model", "options", "fault"),
    [
        (lambda: ToyViT(Shape(pool="cls")), {}, "rows from the second on"),
        pytest.param(
            lambda: ToyViT(Shape(pool="cls", image=(10, 15))),
            {"background": "coarse"},
            "tokens of other cells",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda: ToyViT(Shape(depth=4)),
            {"merge": papr_fx.Merge(2, "all")},
            "merged tokens that weigh alike",
            marks=pytest.mark.slow,
        ),
        (ToyWindows, {}, "masks of other windows"),
    ],
    ids=["drop", "coarse", "merge", "windows"],
)
def test_planted_faults(model, options, fault):
    found = testing.check(model(), toy_proposal(), 0.8 if "merge" in options else 0.5, faults=True, **options).faults
    assert "the least significant" in str(found)
    assert len(found) >= 5
    assert NOTHING not in found.values()
    assert found[fault]
    assert not testing.check(model(), toy_proposal(), 0.8, **options).faults


def test_a_planted_fault_that_the_proof_does_not_see(monkeypatch):
    monkeypatch.setattr("papr_fx.proof.choice.check", lambda case: None)
    monkeypatch.setattr("papr_fx.proof.sizes.check", lambda case: None)
    with pytest.raises(papr_fx.VerifyError, match="planted faults: ToyViT passed its proof with a fault"):
        testing.check(ToyViT(Shape()), toy_proposal(), 0.5, faults=True)
