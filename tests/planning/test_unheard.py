"""Hooks on modules that were traced through never run: to put one there warns."""

import copy
import io
import pickle
import warnings

import pytest
import timm
import torch

import papr_fx

from ..models import Shape, ToyViT, images, toy_proposal
from ..models.windows import ToyWindows

SHAPE = Shape(pool="cls")


def pruned(**options):
    return papr_fx.transform(ToyViT(SHAPE).eval(), toy_proposal(), 0.5, verify=False, **options)


def saved(gm):
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "itself": lambda gm: gm,
    "deepcopy": copy.deepcopy,
    "pickle": lambda gm: pickle.loads(pickle.dumps(gm)),
    "save": saved,
}
HOOKS = {
    "forward": lambda module, hook: module.register_forward_hook(hook),
    "pre": lambda module, hook: module.register_forward_pre_hook(hook),
    "backward": lambda module, hook: module.register_full_backward_hook(hook),
    "pre backward": lambda module, hook: module.register_full_backward_pre_hook(hook),
}


@pytest.mark.parametrize(("made", "kind"), [*(("itself", kind) for kind in HOOKS), *((made, "forward") for made in COPIES)])
def test_a_hook_on_a_module_that_was_traced_through_warns(made, kind):
    gm = COPIES[made](pruned())
    with pytest.warns(papr_fx.HookWarning, match=r"`blocks\.1` was traced through.*so nothing calls it") as found:
        HOOKS[kind](gm.blocks[1], print)
    assert found[0].filename == __file__


def test_a_hook_on_a_part_of_fused_attention_warns():
    gm = papr_fx.transform(ToyWindows().float(), toy_proposal().float(), 0.5, verify=False)
    with pytest.warns(papr_fx.HookWarning, match=r"dropout` was traced through, or is part of attention.*fuse=False"):
        gm.get_submodule("blocks.0.attention.dropout").register_forward_hook(print)
    plain = papr_fx.transform(ToyWindows().float(), toy_proposal().float(), 0.5, fuse=False, verify=False)
    seen = []
    plain.get_submodule("blocks.0.attention.dropout").register_forward_hook(lambda *_: seen.append(1))
    plain(torch.randn(1, 3, 8, 8))
    assert seen


def ran(gm, module):
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", papr_fx.HookWarning)
        handle = module.register_forward_hook(lambda *_: seen.append(1))
    gm(images(SHAPE, 1, dtype=torch.float32))
    handle.remove()
    assert not module._forward_hooks
    return bool(seen)


def warned(module):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        module.register_forward_hook(print).remove()
    return any(issubclass(warning.category, papr_fx.HookWarning) for warning in found)


@pytest.mark.parametrize("narrow", [True, False])
def test_the_warning_is_right(narrow):
    gm = pruned(narrow=narrow)
    modules = [gm.get_submodule(name) for name in ("blocks.0", "blocks.1", "blocks.1.attn", "blocks.1.mlp", "norm")]
    assert [ran(gm, module) for module in modules] == [not warned(module) for module in modules]
    assert [warned(module) for module in modules] == [False, narrow, narrow, False, False]


def test_pixel_operators():
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)).eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 64, 64), verify=False)
    assert warned(gm.stages[0])
    assert not warned(gm.stages[0].blocks[0].conv_dw)
    assert not warned(gm)
    assert not warned(model.stages[0])


def test_copies_of_hooks_do_not_warn_again():
    gm = pruned()
    with pytest.warns(papr_fx.HookWarning):
        gm.blocks[1].register_forward_hook(print)
    assert list(copy.deepcopy(gm).blocks[1]._forward_hooks.values()) == [print]
    papr_fx.set_keep_ratio(gm, 0.3)


def test_a_compiled_module():
    gm = pruned()
    x = images(SHAPE, 2, dtype=torch.float32)
    assert torch.equal(torch.compile(gm, backend="eager", fullgraph=True)(x), gm(x))
