"""Models that other tools made or contain: scripted, parametrised, compiled, exported, of two modalities, under torch.func."""

import pytest
import timm
import torch
import transformers
from torch import nn
from torch.func import functional_call, grad, vmap

import papr_fx
from papr_fx.tracing.numerics import relative_error

from ..models import Shape, ToyViT, images, toy_proposal
from ..models.hierarchical import FAMILIES, masked_run


def weight_normed(mlp: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(mlp.fc1)
    nn.utils.parametrizations.weight_norm(mlp.fc2)


def scripted(mlp: nn.Module) -> None:
    mlp.act = torch.jit.script(nn.GELU())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
@pytest.mark.parametrize("change", [weight_normed, scripted])
@torch.no_grad()
def test_other_mlps_are_pruned(change):
    family = FAMILIES["ConvNeXt, 1x1 convolutions"]
    model = family.model()
    blocks = [module for module in model.modules() if type(module).__name__ == family.block]
    for block in blocks:
        change(block.mlp)
    x = torch.randn(2, 3, *family.size, dtype=torch.float64)
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=x[:1])
    assert len(papr_fx.report(gm).sites) == len(blocks)
    assert relative_error(gm(x), masked_run(family, model, x, papr_fx.keep_masks(gm, x), "zero")) < 1e-9


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_gradients_sample_by_sample():
    gm = papr_fx.transform(ToyViT(Shape()).eval(), toy_proposal(), 0.5)
    x = images(Shape(), 3, dtype=torch.float32)
    parameters = {name: p.detach() for name, p in gm.named_parameters() if p.requires_grad and name != "query"}  # unused

    def loss(parameters, image):
        return functional_call(gm, parameters, (image[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for sample in range(3):
        gm.zero_grad()
        gm(x[sample : sample + 1]).square().sum().backward()
        assert all(relative_error(found[name][sample], gm.get_parameter(name).grad) < 1e-4 for name in parameters)


def clip():
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 64, "vocab_size": 100}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 64, "patch_size": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config={**text, **ends}, vision_config=vision))


def exported():
    return torch.export.export(ToyViT(Shape()).eval(), (images(Shape(), 2, dtype=torch.float32),)).module()


def partly_compiled():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64)
    model.blocks[0].mlp = torch.compile(model.blocks[0].mlp, backend="eager")
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (clip, "CLIPModel takes input_ids before its images: pass model.vision_model"),
        (exported, "model is an exported program"),
        (partly_compiled, r"model\.blocks\.0\.mlp was given to torch\.compile"),
    ],
)
def test_what_cannot_be_rewritten_is_named(build, reason):
    with pytest.raises(papr_fx.ArgumentError, match=reason):
        papr_fx.transform(build(), toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 64, 64))
