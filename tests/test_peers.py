"""PaPr's peers: equal to what they transcribe, and fitted to a number of multiply-accumulates."""

import pytest
import timm
import torch

import papr_fx
from papr_fx import peers
from papr_fx.tracing.numerics import relative_error

from .models import Shape, ToyViT, images, toy_proposal
from .passes.test_pixels import FAMILIES


@pytest.mark.one_in(2)
@pytest.mark.parametrize("background", ["keep", "zero"])
@pytest.mark.parametrize("name", ["ConvNeXt", "ConvNeXt, 1x1 convolutions", "Swin", "torchvision Swin"])
@torch.no_grad()
def test_the_transcription_of_pixel_operators_is_the_same_model(name, background):
    family = FAMILIES[name]
    x = torch.randn(2, 3, *family.size, dtype=torch.float64)
    gm = papr_fx.transform(family.model(), toy_proposal(), 0.4, example_input=x[:1], background=background, verify=False)
    plain = peers.transcribed(gm)
    assert not {node.target for node in plain.graph.nodes} & {node.target for node in gm.graph.nodes if "papr_out" in node.name}
    assert relative_error(plain(x), gm(x)) < 1e-12


@torch.no_grad()
def test_the_transcription_of_tokens_is_the_same_model():
    gm = papr_fx.transform(ToyViT(Shape()).double().eval(), toy_proposal(), 0.5)
    x = images(Shape(), 3)
    assert relative_error(peers.transcribed(gm)(x), gm(x)) < 1e-12


def test_reducers_at_given_macs():
    model = timm.create_model("vit_tiny_patch16_224", depth=4, img_size=112).eval()
    gm = papr_fx.transform(model, toy_proposal(), 1, merge=peers.reduction_named("tome"), verify=False)
    dense = papr_fx.report(gm).dense_macs
    fitted = peers.at_macs(gm, int(0.6 * dense))
    assert papr_fx.report(fitted).total_macs == pytest.approx(0.6 * dense, rel=0.05)
    assert fitted.plan.reduction.blocks == "all"
    whole = peers.at_macs(gm, 2 * dense)
    x = torch.randn(1, 3, 112, 112)
    assert whole.plan.reduction.r == 0
    assert torch.equal(whole(x), model(x))
    assert peers.reduction_named("papr+tome") == papr_fx.Merge(blocks="second-half")
