"""Weights that others find by name and take away between calls, in the manner of `accelerate.cpu_offload`."""

import copy
import functools

import pytest
import timm
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import papr_fx
from papr_fx.evaluation.counts import count_parameters
from papr_fx.tracing.numerics import relative_error

from ..models import Shape, ToyViT, enliven, images, toy_proposal


class Bring:
    """Brings the parameters of one module before its forward, and leaves empty ones behind."""

    def __init__(self, module, state, prefix):
        self.state, self.prefix = state, prefix
        self.take_away(module)

    def take_away(self, module):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)

    def run(self, module, *args, **kwargs):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(self.state[f"{self.prefix}{name}"], requires_grad=False)
        output = module.plain_forward(*args, **kwargs)
        self.take_away(module)
        return output


def offload(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            module.plain_forward = module.forward
            module.bring = Bring(module, state, f"{name}." if name else "")
            holder = type(module) if isinstance(module, torch.fx.GraphModule) else module  # others would be lost by recompile()
            holder.forward = functools.update_wrapper(functools.partial(module.bring.run, module), module.plain_forward)
    return model


def bring_back(model):
    """Takes the wrappers away, as `remove_hook_from_module` does."""
    for module in model.modules():
        if "bring" in vars(module):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(module.bring.state[f"{module.bring.prefix}{name}"])
            holder = type(module) if isinstance(module, torch.fx.GraphModule) else module
            holder.forward = module.plain_forward
            del module.bring, module.plain_forward


def swin():
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=64, embed_dim=8, depths=(1, 1), num_heads=(2, 4))


MODELS = {"tokens": (lambda: ToyViT(Shape()), (3, 8, 12)), "pixels": (swin, (3, 64, 64))}


@pytest.fixture(params=MODELS)
def pruned(request):
    torch.manual_seed(0)
    build, shape = MODELS[request.param]
    x = torch.randn(2, *shape)
    model = enliven(build()).eval()
    return papr_fx.transform(model, toy_proposal(), 0.5, example_input=x[:1], fuse=False, verify=False), x


@torch.no_grad()
def test_an_offloaded_module(pruned):
    plain, x = pruned
    gm = offload(copy.deepcopy(plain))
    assert all(p.is_meta for p in gm.parameters())
    for z in (0.5, 1.0, 0.5):
        for module in (plain, gm):
            papr_fx.set_keep_ratio(module, z)
        assert relative_error(gm(x), plain(x)) < 1e-6  # layers whose calls bring weights are called whole
    assert papr_fx.report(gm) == papr_fx.report(plain)
    for grid, mask in papr_fx.keep_masks(plain, x).items():
        assert torch.equal(papr_fx.keep_masks(gm, x)[grid], mask)
    assert torch.equal(papr_fx.significance(gm, x), papr_fx.significance(plain, x))
    copied = copy.deepcopy(gm)
    papr_fx.set_keep_ratio(copied, 0.25)
    assert relative_error(gm(x), plain(x)) < 1e-6
    bring_back(gm)
    assert relative_error(gm(x), plain(x)) < 1e-6
    for module in (plain, gm):
        papr_fx.set_keep_ratio(module, 0.25)
    assert relative_error(gm(x), plain(x)) < 1e-6
    assert relative_error(copied(x), plain(x)) < 1e-6


def test_fused_attention_that_lost_its_bias_is_refused():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    gm = offload(papr_fx.transform(enliven(swin()).eval(), toy_proposal(), 0.5, example_input=x[:1], verify=False))
    with pytest.raises(papr_fx.ArgumentError, match="its module is not called.*fuse=False"), torch.no_grad():
        gm(x)


def test_nothing_of_the_proposal_is_a_parameter():
    model = ToyViT(Shape()).eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, verify=False)
    model.query.requires_grad_(False)
    trained = get_model_state_dict(gm, options=StateDictOptions(ignore_frozen_params=True))
    assert trained.keys() == model.state_dict().keys() - {"query"}
    gm.requires_grad_(True)
    assert not any(tensor.requires_grad for tensor in gm.papr_proposal.buffers())
    kernel = sum(tensor.numel() for tensor in gm.papr_proposal.buffers())
    assert count_parameters(gm) == sum(p.numel() for p in model.parameters()) + kernel > kernel > 0
    assert count_parameters(model) == sum(p.numel() for p in model.parameters())
    gm.to(torch.float64)
    assert {t.dtype for t in gm.papr_proposal.buffers()} == {torch.float64}
    assert gm(images(Shape(), 2, dtype=torch.float64)).dtype == torch.float64
