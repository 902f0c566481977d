"""Token models of `transformers`, called as users call them: against the unpruned models with hidden keys."""

import pytest
import torch
import transformers
from torch import nn

import papr_fx
from papr_fx.testing import check
from papr_fx.tracing.numerics import relative_error

from .models import enliven, toy_proposal
from .oracles import attention_without

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 48, "image_size": 64}
PATCH_16 = {"patch_size": 16}
BACKBONES = {
    "ViTModel": (1, {}),
    "DeiTModel": (2, {}),
    "BeitModel": (1, {}),
    "Data2VecVisionModel": (1, {"use_relative_position_bias": True}),
    "Dinov2Model": (1, {}),
    "Dinov2WithRegistersModel": (5, {}),
    "DINOv3ViTModel": (5, {"num_register_tokens": 4}),
    "CLIPVisionModel": (1, {}),
    "SiglipVisionModel": (0, {}),
    "ViTMSNModel": (1, {}),
    "IJepaModel": (0, {}),
}
CLASSIFIERS = [
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "BeitForImageClassification",
    "Data2VecVisionForImageClassification",
    "Dinov2ForImageClassification",
    "Dinov2WithRegistersForImageClassification",
    "ViTMSNForImageClassification",
    "IJepaForImageClassification",
]


def build(name: str, **options: object) -> nn.Module:
    kind = getattr(transformers, name)
    return enliven(kind._from_config(kind.config_class(**SMALL, **PATCH_16, **options))).double().eval()


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_features_of_kept_tokens(name):
    prefix, options = BACKBONES[name]
    model = build(name, **options)
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    out = gm(pixel_values=x)
    assert type(out) is type(model(x))
    ((grid, mask),) = papr_fx.keep_masks(gm, x).items()
    assert grid == (4, 4)
    assert out.last_hidden_state.shape == (3, prefix + int((16 + prefix) * 0.5), 32)
    hidden = torch.cat([torch.zeros(3, prefix, dtype=torch.bool), ~mask.flatten(1)], dim=1)
    with attention_without(hidden) as seen:
        dense = model(x).last_hidden_state
    assert seen.seen >= 2  # SigLIP pools by one more
    expected = dense[:, prefix:].transpose(1, 2).reshape(3, -1, 4, 4) * mask.unsqueeze(1)
    assert relative_error(papr_fx.restore_grid(gm, out.last_hidden_state, x), expected) < 1e-12
    if prefix:
        assert relative_error(out.last_hidden_state[:, :prefix], dense[:, :prefix]) < 1e-12
    assert relative_error(dense, model(x).last_hidden_state) > 1e-3
    papr_fx.set_keep_ratio(gm, 1.0)
    assert torch.equal(gm(pixel_values=x).last_hidden_state, model(pixel_values=x).last_hidden_state)


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_classifiers(name):
    model = build(name, num_labels=7)
    assert check(model, toy_proposal(), 0.5).hidden_keys < 1e-12
    gm = papr_fx.transform(model, toy_proposal(), 0.5, verify=False)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    out = gm(pixel_values=x)
    assert type(out) is type(model(x))
    assert out.logits.shape == (2, 7)


@pytest.mark.parametrize("name", ["CLIPForImageClassification", "SiglipForImageClassification"])
@torch.no_grad()
def test_vision_towers_inside_a_classifier(name):
    kind = getattr(transformers, name)
    model = enliven(kind._from_config(kind.config_class(vision_config={**SMALL, **PATCH_16}, num_labels=7))).double().eval()
    assert check(model, toy_proposal(), 0.5).hidden_keys < 1e-12


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
def test_options_that_a_graph_cannot_follow(option):
    model = build("ViTForImageClassification", attn_implementation="eager")
    setattr(model.config, option, True)
    with pytest.raises(papr_fx.ArgumentError, match=f"{option} is True"):
        papr_fx.transform(model, toy_proposal(), 0.5)


@pytest.mark.parametrize("argument", ["labels", "head_mask", "interpolate_pos_encoding", "output_hidden_states"])
def test_arguments_that_a_graph_does_not_take(argument):
    gm = papr_fx.transform(build("ViTForImageClassification"), toy_proposal(), 0.5, verify=False)
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{argument}'"):
        gm(pixel_values=torch.randn(1, 3, 64, 64, dtype=torch.float64), **{argument: None})


class Given(nn.Module):
    """Calls a model with further fixed arguments."""

    def __init__(self, model: nn.Module, **given: object) -> None:
        super().__init__()
        self.model = model
        self.given = given

    def forward(self, x):
        return self.model(x, **self.given)


@torch.no_grad()
def test_interpolated_position_embeddings():
    model = Given(build("ViTModel"), interpolate_pos_encoding=True).eval()
    found = check(model, toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 80, 48))
    assert found.hidden_keys < 1e-12


def test_hidden_states_of_every_layer_are_refused():
    model = Given(build("ViTForImageClassification"), output_hidden_states=True)
    with pytest.raises(papr_fx.PaprError):
        papr_fx.transform(model, toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 64, 64))


def test_inputs_besides_the_images():
    with pytest.raises(papr_fx.TraceError, match="needs more than the images: pixel_attention_mask, spatial_shapes"):
        papr_fx.transform(
            transformers.Siglip2VisionModel._from_config(transformers.Siglip2VisionConfig()),
            toy_proposal(),
            0.5,
            example_input=torch.zeros(1, 3, 64, 64),
        )
