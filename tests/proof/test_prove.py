"""The whole proof: it passes what is right, in the dtype that it needs, and refuses what no part can prove."""

import pytest
import timm
import torch
import torch.nn.functional as F

import papr_fx
from papr_fx.proof.prove import prove
from papr_fx.tracing.numerics import redraw

from ..models import Shape, ToyViT, toy_proposal
from .parts import PARTS, PicksAToken, case_of, failures


def test_no_part_reports_a_sound_rewrite():
    assert len(PARTS) == 16
    assert failures(case_of(ToyViT(Shape()), merge=papr_fx.Merge(2, "all"))) == {}
    convnext = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    assert failures(case_of(convnext, example_input=torch.zeros(1, 3, 64, 64))) == {}


def test_the_proof_of_a_sound_rewrite():
    model = ToyViT(Shape()).double().eval()
    found = prove(model, papr_fx.transform(model, toy_proposal(), 0.5, verify=False))
    assert max(found.permutation, found.order) < 1e-12
    assert found.control > 1e-3


def test_half_precision_is_proved_in_float32():
    model = ToyViT(Shape()).half().eval()
    found = prove(model, papr_fx.transform(model, toy_proposal(), 0.5, verify=False))
    assert found.tolerance == 1e-4
    assert found.permutation < 1e-5
    with pytest.raises(papr_fx.VerifyError):
        papr_fx.transform(PicksAToken(Shape()).half(), toy_proposal(), 0.5)


@pytest.mark.parametrize("name", ["convit_tiny", "xcit_nano_12_p16_224"])
def test_positions_that_no_gather_mends_are_refused(name):
    model = timm.create_model(name, depth=2).eval()
    with pytest.raises(papr_fx.NoSiteError, match="positions beyond the embedding"):
        papr_fx.transform(model, toy_proposal(), 0.5, mode="tokens")


def test_token_trunks_are_not_taken_for_hierarchical_ones():
    with pytest.raises(papr_fx.NoSiteError, match="positions beyond the embedding"):
        papr_fx.transform(timm.create_model("convit_tiny", depth=2).eval(), toy_proposal(), 0.5)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto", "samvit_base_patch16_224"])
def test_spatial_trunks_are_refused(name):
    model = timm.create_model(name).eval()
    example = torch.zeros(1, 3, *model.pretrained_cfg["input_size"][1:])
    with pytest.raises(papr_fx.NoSiteError, match="spatial layout"):
        papr_fx.transform(model, toy_proposal(), 0.5, mode="tokens", example_input=example)


def test_redrawn_parameters_hide_nothing():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64, init_values=1e-6)
    values = redraw(model, torch.Generator().manual_seed(0), torch.float32)
    for name in ("blocks.0.ls1.gamma", "pos_embed", "cls_token", "blocks.0.attn.qkv.bias"):
        assert 0.5 < values[name].std() < 2
    features = F.linear(torch.randn(64, 192), values["blocks.0.mlp.fc1.weight"])
    assert 0.5 < features.std() < 2
