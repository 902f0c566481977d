"""Token models of `transformers`, called as users call them: against the unpruned models with hidden keys."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

import papr_fx
from papr_fx.testing import check
from papr_fx.tracing.numerics import relative_error

from .models import enliven, toy_proposal
from .oracles import attention_without
from .versions import NAMES_RETURN_DICT

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


@pytest.mark.one_in(2)
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


# The others are built of the same parts.
QUICK = ("ViTForImageClassification", "DeiTForImageClassificationWithTeacher", "Data2VecVisionForImageClassification")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CLASSIFIERS])
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


OTHERS = {
    "labels": torch.zeros(1, dtype=torch.long),
    "interpolate_pos_encoding": True,
    "output_hidden_states": True,
    "return_dict": False,
    "of_my_own": 0,
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("argument", OTHERS)
@torch.no_grad()
def test_arguments_of_a_graph(argument):
    gm = papr_fx.transform(build("ViTForImageClassification"), toy_proposal(), 0.5, verify=False)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for ratio in (0.3, 1.0):
        papr_fx.set_keep_ratio(gm, ratio)
        for called in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
            assert torch.equal(called(pixel_values=x, **{argument: None}).logits, gm(x).logits)
            with pytest.raises(papr_fx.ArgumentError, match=f"ViTForImageClassification is a graph in which `{argument}` is "):
                called(x, **{argument: OTHERS[argument]})


TEXT = {
    **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 48, "vocab_size": 99},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 8},
}


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
@torch.no_grad()
def test_a_tower_put_back(name):
    kind = getattr(transformers, name)
    model = kind(kind.config_class(text_config=TEXT, vision_config={**SMALL, **PATCH_16})).eval()
    inputs = {"input_ids": torch.tensor([[1, 5, 2]]), "pixel_values": torch.randn(2, 3, 64, 64)}
    dense = model(**inputs).logits_per_image
    model.vision_model = papr_fx.transform(model.vision_model, toy_proposal(), 0.5)
    pruned = model(**inputs).logits_per_image
    assert pruned.shape == dense.shape
    assert not torch.equal(pruned, dense)
    papr_fx.set_keep_ratio(model.vision_model, 1.0)
    assert torch.equal(model(**inputs).logits_per_image, dense)
    with pytest.raises(papr_fx.ArgumentError, match="`interpolate_pos_encoding` is None or False, not True"):
        model(**inputs, interpolate_pos_encoding=True)


class Speaks(nn.Module):
    """Calls a vision tower as LLaVA does."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.vision_tower = tower

    def forward(self, pixels):
        return self.vision_tower(pixels, output_hidden_states=None, return_dict=True).last_hidden_state


@NAMES_RETURN_DICT
@torch.no_grad()
def test_a_tower_in_a_compiled_model():
    gm = papr_fx.transform(build("CLIPVisionModel"), toy_proposal(), 0.5)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for called in (gm, Speaks(gm)):
        compiled = torch.compile(called, fullgraph=True, backend="eager")
        output = compiled(pixel_values=x, interpolate_pos_encoding=False, return_dict=True) if called is gm else compiled(x)
        assert torch.equal(output.last_hidden_state if called is gm else output, gm(x).last_hidden_state)
    program = torch.export.export(gm, (), {"pixel_values": x})
    assert program.graph_signature.user_inputs == ("pixel_values",)


class Adapted(nn.Module):
    """Passes its arguments on, as the wrappers of peft do."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs)


@torch.no_grad()
def test_wrappers_that_pass_arguments_on():
    model = build("ViTForImageClassification")
    gm = papr_fx.transform(Adapted(Adapted(model)), toy_proposal(), 1.0, example_input=torch.zeros(1, 3, 64, 64))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert torch.equal(gm(pixel_values=x, labels=None, return_dict=True).logits, model(x).logits)
    with pytest.raises(papr_fx.ArgumentError, match="`interpolate_pos_encoding` is None or False, not True"):
        gm(pixel_values=x, interpolate_pos_encoding=True)


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


@torch.no_grad()
def test_hidden_states_of_every_layer_are_those_of_kept_tokens():
    """They are collected by hooks that the library puts on its layers."""
    model = Given(build("ViTForImageClassification"), output_hidden_states=True).eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model(x)
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=x)
    ((_, mask),) = papr_fx.keep_masks(gm, x).items()
    kept = torch.cat([torch.ones(2, 1, dtype=torch.bool), mask.flatten(1)], dim=1)
    with attention_without(~kept):
        dense = model(x).hidden_states
    found = gm(x).hidden_states
    assert len(found) == len(dense) == 3
    for tokens, whole in zip(found, dense, strict=True):
        assert relative_error(tokens, whole[kept].view(2, -1, 32)) < 1e-12
    assert not any(module._forward_hooks for module in gm.modules())  # the graph needs none
    assert any(module._forward_hooks for module in model.modules())


def test_inputs_besides_the_images():
    with pytest.raises(papr_fx.TraceError, match="needs more than the images: pixel_attention_mask, spatial_shapes"):
        papr_fx.transform(
            transformers.Siglip2VisionModel._from_config(transformers.Siglip2VisionConfig()),
            toy_proposal(),
            0.5,
            example_input=torch.zeros(1, 3, 64, 64),
        )
