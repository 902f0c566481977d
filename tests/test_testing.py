"""The tools for users' own suites: they pass what is right and fail what is not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import papr_fx
from papr_fx import ops, testing
from papr_fx.passes import prune_tokens
from papr_fx.proof.hidden_keys import HiddenKeys

from .models import Shape, ToyViT, toy_proposal


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


@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_hidden_keys_equal_attention_over_the_rest(masked):
    q, k, v = (torch.randn(2, 3, 6, 4, dtype=torch.float64) for _ in range(3))
    hidden = torch.tensor([[False, True, False, False, True, False]] * 2)
    seen = ~hidden[0]
    mask = None if masked is None else torch.rand(6, 6) > 0.4
    if mask is not None:
        mask |= torch.eye(6, dtype=torch.bool)
        mask[:, 0] = True
    given = mask if masked == "bool" else None if mask is None else torch.where(mask, 0.0, float("-inf")).double()
    expected = F.scaled_dot_product_attention(q, k[:, :, seen], v[:, :, seen], None if given is None else given[:, seen])
    with HiddenKeys(hidden) as mode:
        actual = F.scaled_dot_product_attention(q, k, v, given)
    assert mode.seen == 1
    assert torch.allclose(actual, expected, atol=1e-12, rtol=0)
