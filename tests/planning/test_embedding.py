"""Only kept patches are embedded: other sizes, clips, hooks, compiled and exported."""

import pytest
import timm
import torch
import transformers
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import papr_fx
from papr_fx.planning.module import sibling
from papr_fx.tracing.numerics import relative_error

from ..models import Shape, ToyViT, enliven, images, toy_proposal
from ..models.embeddings import Twice

SHAPE = Shape(pool="cls")
SMALL = {"depth": 1, "img_size": 64, "num_classes": 5, "embed_dim": 48, "num_heads": 3}


@torch.no_grad()
def test_other_sizes():
    model = enliven(timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, dynamic_img_pad=True, **SMALL)).eval()
    gm = papr_fx.transform(model.double(), toy_proposal().double(), 0.5, verify=False)
    whole = sibling(gm, narrow=False)
    assert papr_fx.report(gm).embedding == "patch_embed.proj"
    for sides in ((64, 64), (96, 64), (48, 112), (70, 90)):
        x = torch.randn(2, 3, *sides, dtype=torch.float64)
        assert relative_error(gm(x), whole(x)) < 1e-12


@torch.no_grad()
def test_clips():
    config = transformers.VideoMAEConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        num_frames=4,
        num_labels=5,
    )
    model = enliven(transformers.VideoMAEForVideoClassification(config)).double().eval()
    gm = papr_fx.transform(model, toy_proposal().double(), 0.5, verify=False)
    x = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)
    assert papr_fx.report(gm).embedding == "videomae.embeddings.patch_embeddings.projection"
    assert relative_error(gm(x), sibling(gm, narrow=False)(x)) < 1e-12


@pytest.mark.parametrize("later", [False, True])
def test_a_convolution_with_hooks_is_called(later):
    model = ToyViT(SHAPE).eval()
    seen = []

    def hook(_module: nn.Module, _arguments: object, out: torch.Tensor) -> None:
        seen.append(out.shape)

    if not later:
        model.proj.register_forward_hook(hook)
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    assert papr_fx.report(gm).embedding == ("proj" if later else "")
    assert ("embedded: all patches, as `proj` has hooks" in str(papr_fx.report(gm))) != later
    x = images(SHAPE, 2, dtype=torch.float32)
    before = gm(x)
    seen.clear()
    if later:
        gm.proj.register_forward_hook(hook)
    assert relative_error(gm(x), before) < 1e-5
    assert seen == [(2, 8, 4, 4)]


def test_compiled_and_exported():
    model = enliven(ToyViT(SHAPE)).eval()
    x = images(SHAPE, 2, dtype=torch.float32)
    gm = papr_fx.transform(model, toy_proposal(), 0.5, verify=False)
    expected = sibling(gm, narrow=False)(x)
    assert relative_error(torch.compile(gm, fullgraph=True, backend=aot_eager)(x), expected) < 1e-5
    program = torch.export.export(gm, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert relative_error(program.module()(x.repeat(2, 1, 1, 1))[:2], expected) < 1e-5
    gm.proj.register_forward_hook(lambda *_: None)
    torch.compiler.reset()
    assert relative_error(torch.compile(gm, fullgraph=True, backend=aot_eager)(x), expected) < 1e-5


class Scaled(ToyViT):
    """A norm by hand in front of the positions, whose derivative at zero is infinite."""

    def patches(self, x: torch.Tensor) -> torch.Tensor:
        tokens = super().patches(x)
        return tokens / (tokens.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6)


def test_gradients_are_finite_and_those_of_all_patches():
    model = enliven(Scaled(SHAPE)).double().eval()
    x = images(SHAPE, 2)
    found = []
    for narrow in (True, False):
        gm = papr_fx.transform(model, toy_proposal().double(), 0.5, narrow=narrow, verify=False)
        model.zero_grad()
        gm(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert papr_fx.report(gm).embedding == ""
    assert relative_error(*found) < 1e-9


def test_indices_on_the_meta_device_are_not_made_up():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, image_size=64, patch_size=16)).eval()
    example = torch.zeros(1, 3, 64, 64, device="meta")
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=example, verify=False)
    assert papr_fx.report(gm).embedding == ""


def test_whichever_convolution_can_be_replaced_is():
    model = Twice(SHAPE).eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    assert papr_fx.report(gm).embedding == "proj"
