"""The significance network in use: frozen, in the model's precision, on resized images."""

import copy

import pytest
import torch
import torch.nn.functional as F

import papr_fx
from papr_fx.tracing.numerics import relative_error

from ..models import Shape, ToyViT, toy_proposal
from .networks import before_pooling, built, timm_model


def test_frozen_for_ever():
    gm = papr_fx.transform(ToyViT(Shape()), toy_proposal(), 0.5)
    gm.train()
    assert gm.training
    assert not any(module.training for module in gm.papr_proposal.modules())
    loss = gm(torch.randn(2, 3, 8, 12)).sum()
    loss.backward()
    assert not list(gm.papr_proposal.parameters())
    assert len([t for t in gm.papr_proposal.buffers() if t.ndim == 4]) == 2
    assert not any(t.requires_grad for t in gm.papr_proposal.buffers())
    assert all(p.grad is not None for name, p in gm.named_parameters() if not name.startswith(("papr_proposal", "query")))


@pytest.mark.parametrize(("size", "resized"), [(64, (64, 85)), ((48, 40), (48, 40))])
def test_proposal_size(size, resized):
    network = timm_model("resnet18")
    x = torch.randn(2, 3, 96, 128)
    small = F.interpolate(x, size=resized, mode="bilinear", align_corners=False)
    with torch.no_grad():
        assert relative_error(built(network, size=size)(x), before_pooling(network, "global_pool")(small).mean(1)) < 1e-4


def test_precision_follows_the_model():
    model = ToyViT(Shape()).bfloat16()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    assert {p.dtype for p in gm.papr_proposal.buffers()} == {torch.bfloat16}
    assert gm(torch.randn(2, 3, 8, 12).bfloat16()).dtype == torch.bfloat16
    half = papr_fx.transform(ToyViT(Shape()), copy.deepcopy(toy_proposal()).half(), 0.5)
    assert {p.dtype for p in half.papr_proposal.buffers()} == {torch.float32}


def test_a_state_dict_of_no_destination_is_empty():
    network = papr_fx.transform(ToyViT(Shape()), toy_proposal(), 0.5, verify=False).papr_proposal
    assert network.state_dict(destination=None) == {}
    assert network.state_dict() == {}
    given = {"model": 1}
    assert network.state_dict(destination=given) is given
