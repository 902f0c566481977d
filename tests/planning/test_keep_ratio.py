"""Changing the keep ratio and the mode of a transformed module in place."""

import gc
import weakref

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import papr_fx

from ..models import Attention, Shape, ToyViT, enliven, toy_proposal

IMAGES = torch.randn(2, 3, 8, 12)


class Demanding(Attention):
    """Refuses fewer than four tokens."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < 4:
            raise RuntimeError("needs four tokens")
        return super().forward(x)


def demanding() -> ToyViT:
    model = ToyViT(Shape()).eval()
    for block in model.blocks:
        block.attn = Demanding(8, 2, True)
    return model


def test_a_keep_ratio_that_fails_changes_nothing():
    gm = papr_fx.transform(demanding(), toy_proposal(), 0.5)
    before, code = gm(IMAGES), gm.code
    message = r"does not run at z=0\.1, where 2 of 17 positions are left: `blocks\.0.*needs four tokens.*stays 0\.5"
    with pytest.raises(papr_fx.NoSiteError, match=message):
        papr_fx.set_keep_ratio(gm, 0.1)
    assert gm.plan.z == 0.5
    assert gm.code == code
    assert torch.equal(gm(IMAGES), before)
    papr_fx.set_keep_ratio(gm, 0.7)
    assert gm(IMAGES).shape == before.shape


def test_only_the_last_graphs_are_kept():
    gm = papr_fx.transform(enliven(ToyViT(Shape())).eval(), toy_proposal(), 0.5, verify=False)
    first, expected = weakref.ref(gm._written.__code__), gm(IMAGES)
    ratios = [0.2 + 0.01 * step for step in range(20)]
    for z in ratios:
        papr_fx.set_keep_ratio(gm, z)
    gc.collect()
    assert first() is None
    code = gm._written.__code__
    papr_fx.set_keep_ratio(gm, ratios[-16])  # the oldest that is kept
    assert gm._written.__code__ is not code
    for z in ratios[-15:]:
        papr_fx.set_keep_ratio(gm, z)
    assert gm._written.__code__ is code
    papr_fx.set_keep_ratio(gm, 0.5)
    assert torch.equal(gm(IMAGES), expected)


def compilations(gm: nn.Module, changes) -> int:
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(gm, backend=counter)
    for change in changes:
        change(gm)
        compiled(torch.randn(2, 3, 32, 32))
    return counter.frame_count


def test_modes_that_were_compiled_are_not_compiled_again():
    model = timm.create_model("convnext_atto", num_classes=2, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)).eval()
    example = torch.zeros(1, 3, 32, 32)
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=example, verify=False)
    assert not gm.plan.one_graph
    train, evaluate = (lambda m: m.train()), (lambda m: m.eval())
    once = compilations(gm.eval(), [evaluate, train])
    assert compilations(gm.eval(), [evaluate, train] * 3) == once


def test_keep_ratios_that_were_compiled_are_not_compiled_again():
    gm = papr_fx.transform(ToyViT(Shape(image=(32, 32), patch=(8, 8))).eval(), toy_proposal(), 0.5, verify=False)
    low, high = (lambda m: papr_fx.set_keep_ratio(m, 0.3)), (lambda m: papr_fx.set_keep_ratio(m, 0.8))
    assert compilations(gm, [low, high] * 3) == compilations(gm, [low, high])
    x = torch.randn(2, 3, 32, 32)
    low(gm)
    first = gm(x)
    high(gm)
    assert not torch.equal(gm(x), first)
    low(gm)
    assert torch.equal(gm(x), first)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_restored_grids_of_bfloat16_are_those_of_the_kept_tokens(compiled):
    """The choice is made again; it must give the kept tokens in the same order."""
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64, num_classes=0, global_pool="").eval()
    gm = papr_fx.transform(model.bfloat16(), toy_proposal(), 0.5, verify=False)
    images = torch.randn(16, 3, 64, 64, dtype=torch.bfloat16)
    runner = torch.compile(gm) if compiled else gm
    with torch.no_grad():
        tokens = runner(images)
        rows = papr_fx.ops.TokenRows((4, 4), 1)
        cells = [mask.flatten().nonzero()[:, 0].tolist() for mask in papr_fx.keep_masks(gm, images)[4, 4]]
        restored = papr_fx.restore_grid(gm, tokens, images)
    agree = 0
    for sample in range(len(images)):
        wanted = torch.zeros(16, 192, dtype=torch.bfloat16)
        for place, cell in enumerate(cells[sample]):  # kept cells in ascending order, as the tokens are
            wanted[cell] = tokens[sample, rows.prefix + place]
        agree += torch.equal(restored[sample].flatten(1).T, wanted)
    assert agree == len(images)
