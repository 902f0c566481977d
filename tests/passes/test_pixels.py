"""Pixel operators against the original models with masked branches: hooks on their own modules, no code of the rewrite."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from math import prod

import pytest
import timm
import torch
import torchvision
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.convnext import ConvNeXt as TorchvisionConvNeXt
from torchvision.models.maxvit import MaxVit, PartitionAttentionLayer
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

import papr_fx
from papr_fx import ops
from papr_fx.passes import prune_pixels
from papr_fx.tracing.numerics import relative_error, tensors_of

from ..models import enliven, toy_proposal


@dataclass(frozen=True)
class Family:
    """How to build a small model, and where its blocks and their MLP branches are: written by hand, from the models' code."""

    build: object
    block: str
    branch: str
    size: tuple[int, int] = (64, 64)
    natural: str = "keep"
    behind: str = ""  # what the block still does to its output, where a background of zero is no longer zero

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = enliven(self.build()).double().eval()
        for module in model.modules():  # tables that live in buffers, and temperatures, as they are
            module.training = False
        return model


def timm_model(name, **options):
    return lambda: timm.create_model(name, **options)


def huggingface(name, **options):
    def build():
        kind = getattr(transformers, name)
        return kind._from_config(kind.config_class(image_size=64, num_labels=5, **options))

    return build


FAMILIES = {
    "ConvNeXt": Family(
        timm_model("convnext_tiny", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)), "ConvNeXtBlock", "drop_path", natural="zero"
    ),
    "ConvNeXt, 1x1 convolutions": Family(
        timm_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)), "ConvNeXtBlock", "drop_path", natural="zero"
    ),
    "ConvNeXt without layer scale": Family(
        timm_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), ls_init_value=None),
        "ConvNeXtBlock",
        "drop_path",
        natural="zero",
    ),
    "ConvNeXt V2": Family(
        timm_model("convnextv2_tiny", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)), "ConvNeXtBlock", "drop_path", natural="zero"
    ),
    "ConvNeXt V2, 1x1 convolutions": Family(
        timm_model("convnextv2_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)), "ConvNeXtBlock", "drop_path", natural="zero"
    ),
    "Swin": Family(
        timm_model(
            "swin_tiny_patch4_window7_224", img_size=64, embed_dim=8, depths=(1, 2), num_heads=(2, 4), drop_path_rate=0.0
        ),
        "SwinTransformerBlock",
        "drop_path2",
    ),
    "Swin, padded windows": Family(
        timm_model(
            "swin_tiny_patch4_window7_224", img_size=(72, 40), embed_dim=8, depths=(2, 2), num_heads=(2, 4), window_size=4
        ),
        "SwinTransformerBlock",
        "drop_path2",
        (72, 40),
    ),
    "SwinV2": Family(
        timm_model("swinv2_tiny_window8_256", img_size=64, embed_dim=8, depths=(1, 2), num_heads=(2, 4), window_size=4),
        "SwinTransformerV2Block",
        "drop_path2",
    ),
    "SwinV2-CR": Family(
        timm_model("swinv2_cr_tiny_224", img_size=64, embed_dim=8, depths=(1, 2), num_heads=(2, 4), window_size=4),
        "SwinTransformerV2CrBlock",
        "drop_path2",
        behind="norm3",
    ),
    "transformers ConvNext": Family(
        huggingface("ConvNextForImageClassification", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]),
        "ConvNextLayer",
        "drop_path",
        natural="zero",
    ),
    "transformers ConvNextV2": Family(
        huggingface("ConvNextV2ForImageClassification", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]),
        "ConvNextV2Layer",
        "drop_path",
        natural="zero",
    ),
    "transformers DINOv3 ConvNext": Family(
        huggingface("DINOv3ConvNextModel", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]),
        "DINOv3ConvNextLayer",
        "drop_path",
        natural="zero",
    ),
    "transformers Swin": Family(
        huggingface("SwinForImageClassification", embed_dim=8, depths=[1, 2], num_heads=[2, 4], window_size=4),
        "SwinLayer",
        "mlp",
    ),
    "transformers Swinv2": Family(
        huggingface("Swinv2ForImageClassification", embed_dim=8, depths=[1, 2], num_heads=[2, 4], window_size=4),
        "Swinv2Layer",
        "layernorm_after",
    ),
    "torchvision ConvNeXt": Family(
        lambda: TorchvisionConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)], num_classes=5),
        "CNBlock",
        "stochastic_depth",
        natural="zero",
    ),
    "torchvision Swin": Family(
        lambda: TorchvisionSwin([4, 4], 8, [1, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=5),
        "SwinTransformerBlock",
        "mlp",
    ),
    "torchvision SwinV2": Family(
        lambda: TorchvisionSwin(
            [4, 4], 8, [1, 2], [2, 4], [4, 4], num_classes=5, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2
        ),
        "SwinTransformerBlockV2",
        "norm2",
    ),
}


def masked(value, masks):
    """`value` with dropped positions zeroed: rank 3 is (B, N, C), rank 4 has the grid in its middle or last axes."""
    if isinstance(value, tuple):  # transformers' layers return attention weights beside it
        return (masked(value[0], masks), *value[1:])
    for grid, mask in masks.items():
        mask = mask.to(value.dtype)
        if value.ndim == 3 and value.shape[1] == prod(grid):
            return value * mask.flatten(1).unsqueeze(-1)
        if value.ndim == 4 and tuple(value.shape[1:3]) == grid:
            return value * mask.unsqueeze(-1)
        if value.ndim == 4 and tuple(value.shape[2:]) == grid:
            return value * mask.unsqueeze(1)
    raise AssertionError(f"{tuple(value.shape)} has none of the grids {list(masks)}")


def masked_run(family, model, x, masks, background):
    """The original model, masked: for "zero" a block's output, for "keep" its MLP branch; GRN's input in both."""
    handles = []
    for module in model.modules():
        if type(module).__name__ == family.block:
            if background == "zero" and family.behind:
                last = module.get_submodule(family.behind)
                handles.append(last.register_forward_pre_hook(lambda _m, inputs: (masked(inputs[0], masks),)))
                continue
            target = module if background == "zero" else module.get_submodule(family.branch)
            handles.append(target.register_forward_hook(lambda _m, _i, out: masked(out, masks)))
        if type(module).__name__ in ("GlobalResponseNorm", "ConvNextV2GRN"):
            handles.append(module.register_forward_pre_hook(lambda _m, inputs: (masked(inputs[0], masks),)))
    try:
        return model(x)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("background", ["auto", "keep", "zero"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_masked_branch(name, background):
    family = FAMILIES[name]
    model = family.model()
    x = torch.randn(3, 3, *family.size, dtype=torch.float64)
    gm = papr_fx.transform(model, toy_proposal(), 0.6, example_input=x[:1], background=background)
    blocks = sum(type(m).__name__ == family.block for m in model.modules())
    found = papr_fx.report(gm)
    assert (found.mode, len(found.sites)) == ("pixels", blocks), found.left_alone
    masks = papr_fx.keep_masks(gm, x)
    assert all(mask.flatten(1).sum(1).tolist() == [int(prod(grid) * 0.6)] * 3 for grid, mask in masks.items())
    rule = family.natural if background == "auto" else background
    assert {site.background for site in found.sites} == {rule}
    pruned = gm(x)
    assert relative_error(pruned, masked_run(family, model, x, masks, rule)) < 1e-9
    other = {grid: mask.roll(1, -1) for grid, mask in masks.items()}
    assert relative_error(pruned, masked_run(family, model, x, other, rule)) > 1e-6
    assert relative_error(pruned, model(x)) > 1e-6
    papr_fx.set_keep_ratio(gm, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(gm(x)), tensors_of(model(x)), strict=True))


@settings(max_examples=12)
@given(st.data())
@torch.no_grad()
def test_any_tiny_convnext(data):
    depths = data.draw(st.lists(st.integers(1, 2), min_size=4, max_size=4))
    dims = data.draw(st.lists(st.sampled_from([5, 7, 11]), min_size=4, max_size=4))
    # no width is a side of a grid: the oracle would take channels for positions
    rows, columns = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    options = {"conv_mlp": data.draw(st.booleans()), "use_grn": data.draw(st.booleans())}
    z, background = data.draw(st.floats(0.05, 0.99)), data.draw(st.sampled_from(["keep", "zero"]))
    torch.manual_seed(0)
    model = enliven(ConvNeXt(depths=depths, dims=dims, num_classes=5, kernel_sizes=3, **options)).double().eval()
    family = Family(None, "ConvNeXtBlock", "drop_path")
    x = torch.randn(data.draw(st.integers(1, 3)), 3, rows * 32, columns * 32, dtype=torch.float64)
    gm = papr_fx.transform(model, toy_proposal(), z, example_input=x[:1], background=background, verify=False)
    masks = papr_fx.keep_masks(gm, x)
    assert [mask.sum().item() for mask in masks.values()] == [len(x) * max(1, int(prod(grid) * z)) for grid in masks]
    assert relative_error(gm(x), masked_run(family, model, x, masks, background)) < 1e-9


@settings(max_examples=12)
@given(st.data())
@torch.no_grad()
def test_any_tiny_swin(data):
    stages = data.draw(st.integers(1, 2))
    depths = data.draw(st.lists(st.integers(1, 2), min_size=stages, max_size=stages))
    window = data.draw(st.integers(2, 5))
    size = tuple(4 * 2 ** (stages - 1) * data.draw(st.integers(2, 5)) for _ in range(2))
    z, background = data.draw(st.floats(0.05, 0.99)), data.draw(st.sampled_from(["keep", "zero"]))
    torch.manual_seed(0)
    model = SwinTransformer(
        img_size=size, embed_dim=8, depths=depths, num_heads=[2] * stages, window_size=window, num_classes=5
    )
    model = enliven(model).double().eval()
    x = torch.randn(data.draw(st.integers(1, 3)), 3, *size, dtype=torch.float64)
    gm = papr_fx.transform(model, toy_proposal(), z, mode="pixels", background=background, verify=False)
    family = Family(None, "SwinTransformerBlock", "drop_path2")
    masks = papr_fx.keep_masks(gm, x)
    assert relative_error(gm(x), masked_run(family, model, x, masks, background)) < 1e-9


@torch.no_grad()
def test_other_image_sizes_are_pruned_by_their_own_grids():
    family = FAMILIES["ConvNeXt"]
    model = family.model()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 64, 64))
    x = torch.randn(2, 3, 96, 160, dtype=torch.float64)
    masks = papr_fx.keep_masks(gm, x)
    assert list(masks) == [(24, 40), (12, 20), (6, 10), (3, 5)]
    assert relative_error(gm(x), masked_run(family, model, x, masks, "zero")) < 1e-9


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
    assert all(p.grad is None for p in gm.papr_proposal.parameters())
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


def in_windows(mask, side, *, across):
    """A mask (B, h, w) as MaxViT orders positions, (B, windows, places, 1); `across` takes every so-manieth position."""
    rows, columns = mask.shape[1:]
    windows, places = (rows // side) * (columns // side), side * side
    out = mask.new_zeros(len(mask), windows, places, 1)
    for i in range(rows):
        for j in range(columns):
            window, place = (i // side) * (columns // side) + j // side, (i % side) * side + j % side
            out[:, window, place, 0] = mask[:, i, j]
    return out.transpose(1, 2) if across else out


@pytest.mark.parametrize("background", ["keep", "zero"])
@torch.no_grad()
def test_positions_that_were_moved_into_windows(background):
    """Torchvision's MaxViT leaves positions in windows from attention to MLP, and takes the next windows across them."""
    torch.manual_seed(0)
    options = {"stem_channels": 8, "partition_size": 4, "head_dim": 4, "stochastic_depth_prob": 0.0, "num_classes": 5}
    model = MaxVit(input_size=(64, 64), block_channels=[8, 16], block_layers=[2, 1], **options)
    model = enliven(model).double().eval()
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    gm = papr_fx.transform(model, toy_proposal(), 0.6, example_input=x[:1], background=background)
    assert [site.grid for site in papr_fx.report(gm).sites] == [(16, 16)] * 4 + [(8, 8)] * 2
    masks = papr_fx.keep_masks(gm, x)
    handles = []
    for layer in (m for m in model.modules() if isinstance(m, PartitionAttentionLayer)):
        mask = in_windows(masks[layer.grid_size].double(), layer.p, across=layer.partition_type == "grid")
        target = layer.departition_swap if background == "zero" else layer.mlp_layer
        handles.append(
            target.register_forward_pre_hook(lambda _m, inputs, mask=mask: (inputs[0] * mask,))
            if background == "zero"
            else target.register_forward_hook(lambda _m, _i, out, mask=mask: out * mask)
        )
    expected = model(x)
    for handle in handles:
        handle.remove()
    assert relative_error(gm(x), expected) < 1e-9
    assert relative_error(model(x), expected) > 1e-6
    found = papr_fx.testing.check(model, toy_proposal(), 0.5, example_input=x[:1])
    assert found.masked_branch < 1e-9 < 1e-6 < found.corrupted


def test_the_proof_sees_windows_taken_for_rows(monkeypatch):
    monkeypatch.setattr(prune_pixels, "moved_cells", lambda keep, cells: keep)
    model = MaxVit((32, 32), 8, 4, [8], [1], head_dim=4, stochastic_depth_prob=0.0, num_classes=5)
    with pytest.raises(papr_fx.VerifyError, match="regions"):
        papr_fx.transform(model.eval(), toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("name", ["ConvNeXt V2", "Swin"])
@torch.no_grad()
def test_copies_and_check(name, tmp_path):
    family = FAMILIES[name]
    model = family.model()
    x = torch.randn(2, 3, *family.size, dtype=torch.float64)
    found = papr_fx.testing.check(model, toy_proposal(), 0.5, example_input=x[:1])
    assert found.masked_branch < 1e-9 < 1e-6 < found.corrupted
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=x[:1])
    torch.save(gm, tmp_path / "gm.pt")
    for other in (copy.deepcopy(gm), torch.load(tmp_path / "gm.pt", weights_only=False)):
        assert torch.equal(other(x), gm(x))
        papr_fx.set_keep_ratio(other, 0.25)
        papr_fx.set_keep_ratio(other, 0.5)
        assert torch.equal(other(x), gm(x))


@pytest.mark.parametrize("name", ["ConvNeXt", "torchvision Swin"])
@torch.no_grad()
def test_compiles_as_one_graph_in_inductor(name):
    family = FAMILIES[name]
    model = family.model().float()
    x = torch.randn(2, 3, *family.size)
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=x[:1])
    torch.compiler.reset()
    compiled = torch.compile(gm, fullgraph=True)
    assert relative_error(compiled(x), gm(x)) < 1e-4


@pytest.mark.parametrize(
    ("build", "sites"), [(timm_model("convnext_tiny"), 18), (torchvision.models.swin_t, 12)], ids=["convnext", "swin"]
)
def test_meta_models_are_planned_without_numbers(build, sites):
    with torch.device("meta"):
        model = build().eval()
    example = torch.zeros(1, 3, 224, 224)
    gm = papr_fx.transform(model, timm.create_model("mobileone_s0"), 0.65, example_input=example, verify=False)
    assert len(papr_fx.report(gm).sites) == sites


@pytest.mark.parametrize(
    ("name", "dense", "pruned"), [("convnext_base", 15.38, 10.42), ("swin_base_patch4_window7_224", 15.47, 12.25)]
)
def test_figures_of_the_paper(name, dense, pruned):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    found = papr_fx.report(papr_fx.transform(model, timm.create_model("mobileone_s0"), 0.65, verify=False))
    assert found.dense_macs / 1e9 == pytest.approx(dense, rel=0.01)
    assert found.total_macs / 1e9 == pytest.approx(pruned, rel=0.01)


def test_ops_against_loops():
    x = torch.randn(2, 5, 3, 4)
    keep = torch.tensor([[1, 11, 6], [0, 2, 9]])
    rows = ops.pixel_rows(keep, (3, 4))
    picked = ops.gather_pixels(x, rows, (3, 4), "BCHW")  # (2, 5, 3, 1)
    for image in range(2):
        for place, cell in enumerate(keep[image].tolist()):
            assert torch.equal(picked[image, :, place, 0], x[image, :, cell // 4, cell % 4])
    written = ops.write_pixels(x, picked, rows, "BCHW", "zero")
    expected = torch.zeros_like(x)
    for image in range(2):
        for cell in keep[image].tolist():
            expected[image, :, cell // 4, cell % 4] = 2 * x[image, :, cell // 4, cell % 4]
    assert torch.equal(written, expected)
    kept = ops.write_pixels(x, picked, rows, "BCHW", "keep")
    assert torch.equal(kept, torch.where(expected != 0, expected, x))
    last = ops.gather_pixels(x.permute(0, 2, 3, 1), rows, (3, 4), "BHWC")
    assert torch.equal(last, picked.permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match="chosen for a grid"):
        ops.gather_pixels(x, rows, (4, 3), "BCHW")


def test_torchvision_models_whole():
    gm = papr_fx.transform(
        torchvision.models.convnext_tiny().eval(), toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 64, 64)
    )
    assert len(papr_fx.report(gm).sites) == 18
