"""Whole hierarchical models: how many operators are planned, and their background and gradients in training."""

import pytest
import timm
import torch
import torchvision

import papr_fx
from papr_fx.tracing.numerics import relative_error

from ..models import enliven, toy_proposal
from ..models.hierarchical import FAMILIES, masked_run, timm_model


@pytest.mark.parametrize(
    ("build", "sites"),
    [
        pytest.param(timm_model("convnext_tiny"), 18, id="convnext"),
        pytest.param(torchvision.models.swin_t, 12, id="swin", marks=pytest.mark.slow),
    ],
)
def test_meta_models_are_planned_without_numbers(build, sites):
    model = build().eval().to("meta")
    example = torch.zeros(1, 3, 224, 224)
    gm = papr_fx.transform(model, timm.create_model("mobileone_s0"), 0.65, example_input=example, verify=False)
    assert len(papr_fx.report(gm).sites) == sites


@pytest.mark.slow
def test_torchvision_models_whole():
    gm = papr_fx.transform(
        torchvision.models.convnext_tiny().eval(), toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 64, 64)
    )
    assert len(papr_fx.report(gm).sites) == 18


def test_training_keeps_the_residual_and_gradients_reach_all_but_the_proposal():
    family = FAMILIES["ConvNeXt"]
    model = family.model()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 64, 64)).train()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert not model.training
    assert {site.background for site in papr_fx.report(gm).sites} == {"keep"}
    output = gm(x)
    assert relative_error(output, masked_run(family, model, x, papr_fx.keep_masks(gm, x), "keep")) < 1e-9
    output.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in model.parameters())
    assert not any(t.requires_grad for t in gm.papr_proposal.buffers())
    assert {site.background for site in papr_fx.report(gm.eval()).sites} == {"zero"}


@pytest.mark.parametrize("family", ["ConvNeXt", "Swin"])
def test_gradients_are_those_of_the_masked_model(family):
    family = FAMILIES[family]
    model = family.model()
    x = torch.randn(2, 3, *family.size, dtype=torch.float64)
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=x[:1]).train()
    masks = papr_fx.keep_masks(gm, x)
    expected = torch.autograd.grad(masked_run(family, model, x, masks, "keep").square().sum(), list(model.parameters()))
    actual = torch.autograd.grad(gm(x).square().sum(), list(model.parameters()))
    assert max(relative_error(a, e) for a, e in zip(actual, expected, strict=True)) < 1e-8


def test_drop_path_and_dropout_work_in_training():
    build = timm_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), drop_path_rate=0.5, drop_rate=0.3)
    model = enliven(build()).train()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 64, 64))
    x = torch.randn(4, 3, 64, 64)
    assert not torch.equal(gm(x), gm(x))
    gm.eval()
    assert torch.equal(gm(x), gm(x))


def test_a_model_that_was_traced_before_loses_no_site():
    model = timm.create_model("convnext_atto", num_classes=5).eval()
    found = [
        papr_fx.report(papr_fx.transform(m, toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 64, 64), verify=False))
        for m in (model, torch.fx.symbolic_trace(model))
    ]
    assert [site.grid for site in found[0].sites] == [site.grid for site in found[1].sites]
    assert len(found[0].sites) == 12
