"""Pixel operators against the original models, run with masked branches by hooks on their own modules."""

from __future__ import annotations

import copy
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from torchvision.models.maxvit import MaxVit, PartitionAttentionLayer

import papr_fx
from papr_fx.passes import index_pixels
from papr_fx.planning.module import sibling
from papr_fx.tracing.numerics import relative_error, tensors_of

from ..models import enliven, toy_proposal
from ..models.hierarchical import FAMILIES, Family, masked_run
from ..oracles import count_by_hand
from ..versions import SWIN_OF_TRANSFORMERS

OTHER = ("ConvNeXt", "ConvNeXt V2, 1x1 convolutions", "Swin, padded windows", "torchvision SwinV2", "transformers Swin")


def backgrounds():
    """The background that a family has by itself, under its name too (the same graph, so slow), and the other one.

    The other one is slow too but for one family of each kind: it changes one argument.
    """
    for name, family in FAMILIES.items():
        for background in ("auto", "keep", "zero"):
            marks = [pytest.mark.slow] * (background == family.natural or (background != "auto" and name not in OTHER))
            marks += [SWIN_OF_TRANSFORMERS] * name.startswith("transformers Swin")
            yield pytest.param(name, background, marks=marks, id=f"{name}-{background}")


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("name", "background"), [*backgrounds()])
@torch.no_grad()
def test_masked_branch(name, background):
    family = FAMILIES[name]
    model = family.model()
    x = torch.randn(3, 3, *family.size, dtype=torch.float64)
    mode = "auto" if background == "auto" else "pixels"
    gm = papr_fx.transform(model, toy_proposal(), 0.6, example_input=x[:1], mode=mode, background=background)
    blocks = sum(type(m).__name__ == family.block for m in model.modules())
    found = papr_fx.report(gm)
    assert (found.mode, len(found.sites)) == ("pixels", blocks), found.left_alone
    masks = papr_fx.keep_masks(gm, x)
    assert all(mask.flatten(1).sum(1).tolist() == [count_by_hand(prod(grid), 0.6)] * 3 for grid, mask in masks.items())
    rule = family.natural if background == "auto" else background
    assert {site.background for site in found.sites} == {rule}
    pruned = gm(x)
    assert relative_error(pruned, masked_run(family, model, x, masks, rule)) < 1e-9
    other = {grid: mask.roll(1, -1) for grid, mask in masks.items()}
    assert relative_error(pruned, masked_run(family, model, x, other, rule)) > 1e-6
    assert relative_error(pruned, model(x)) > 1e-6
    papr_fx.set_keep_ratio(gm, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(gm(x)), tensors_of(model(x)), strict=True))


several_ratios = st.lists(st.floats(0.05, 0.99), min_size=2, max_size=2)


@settings(max_examples=3)
@given(st.data())
@torch.no_grad()
def test_any_tiny_convnext(data):
    depths = data.draw(st.lists(st.integers(1, 2), min_size=4, max_size=4))
    dims = data.draw(st.lists(st.sampled_from([5, 7, 11]), min_size=4, max_size=4))
    # no width equals a side of a grid, or the oracle would take channels for positions
    rows, columns = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    options = {"conv_mlp": data.draw(st.booleans()), "use_grn": data.draw(st.booleans())}
    ratios, background = data.draw(several_ratios), data.draw(st.sampled_from(["keep", "zero"]))
    torch.manual_seed(0)
    model = enliven(ConvNeXt(depths=depths, dims=dims, num_classes=5, kernel_sizes=3, **options)).double().eval()
    family = Family(None, "ConvNeXtBlock", "drop_path")
    x = torch.randn(data.draw(st.integers(1, 3)), 3, rows * 32, columns * 32, dtype=torch.float64)
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=x[:1], background=background, verify=False)
    for z in ratios:
        pruned = sibling(gm, z=z)
        masks = papr_fx.keep_masks(pruned, x)
        assert [mask.sum().item() for mask in masks.values()] == [len(x) * count_by_hand(prod(grid), z) for grid in masks]
        assert relative_error(pruned(x), masked_run(family, model, x, masks, background)) < 1e-9


@settings(max_examples=4)
@given(st.data())
@torch.no_grad()
def test_any_tiny_swin(data):
    stages = data.draw(st.integers(1, 2))
    depths = data.draw(st.lists(st.integers(1, 2), min_size=stages, max_size=stages))
    window = data.draw(st.integers(2, 5))
    size = tuple(4 * 2 ** (stages - 1) * data.draw(st.integers(2, 5)) for _ in range(2))
    ratios, background = data.draw(several_ratios), data.draw(st.sampled_from(["keep", "zero"]))
    torch.manual_seed(0)
    model = SwinTransformer(
        img_size=size, embed_dim=8, depths=depths, num_heads=[2] * stages, window_size=window, num_classes=5
    )
    model = enliven(model).double().eval()
    x = torch.randn(data.draw(st.integers(1, 3)), 3, *size, dtype=torch.float64)
    gm = papr_fx.transform(model, toy_proposal(), 0.5, mode="pixels", background=background, verify=False)
    family = Family(None, "SwinTransformerBlock", "drop_path2")
    for z in ratios:
        pruned = sibling(gm, z=z)
        masks = papr_fx.keep_masks(pruned, x)
        assert relative_error(pruned(x), masked_run(family, model, x, masks, background)) < 1e-9


@torch.no_grad()
def test_other_image_sizes_are_pruned_by_their_own_grids():
    family = FAMILIES["ConvNeXt"]
    model = family.model()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 64, 64))
    x = torch.randn(2, 3, 96, 160, dtype=torch.float64)
    masks = papr_fx.keep_masks(gm, x)
    assert list(masks) == [(24, 40), (12, 20), (6, 10), (3, 5)]
    assert relative_error(gm(x), masked_run(family, model, x, masks, "zero")) < 1e-9


def in_windows(mask, side, *, across):
    """A mask (B, h, w) in MaxViT's order, (B, windows, places, 1). With `across`, windows are strided."""
    rows, columns = mask.shape[1:]
    windows, places = (rows // side) * (columns // side), side * side
    out = mask.new_zeros(len(mask), windows, places, 1)
    for i in range(rows):
        for j in range(columns):
            window, place = (i // side) * (columns // side) + j // side, (i % side) * side + j % side
            out[:, window, place, 0] = mask[:, i, j]
    return out.transpose(1, 2) if across else out


def maxvit():
    """Its positions stay in windows from attention to MLP; every second layer has strided windows."""
    torch.manual_seed(0)
    options = {"stem_channels": 8, "partition_size": 4, "head_dim": 4, "stochastic_depth_prob": 0.0, "num_classes": 5}
    model = MaxVit(input_size=(64, 64), block_channels=[8, 16], block_layers=[2, 1], **options)
    return enliven(model).double().eval()


def test_public_check_of_positions_in_windows():
    found = papr_fx.testing.check(maxvit(), toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 64, 64))
    assert found.masked_branch < 1e-9 < 1e-6 < found.corrupted


@pytest.mark.parametrize("background", ["keep", "zero"])
@torch.no_grad()
def test_positions_that_were_moved_into_windows(background):
    model = maxvit()
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


def test_the_proof_sees_windows_taken_for_rows(monkeypatch):
    monkeypatch.setattr(index_pixels, "moved_cells", lambda keep, cells: keep)
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
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=x[:1], verify=False)
    torch.save(gm, tmp_path / "gm.pt")
    for other in (copy.deepcopy(gm), torch.load(tmp_path / "gm.pt", weights_only=False)):
        assert torch.equal(other(x), gm(x))
        papr_fx.set_keep_ratio(other, 0.25)
        papr_fx.set_keep_ratio(other, 0.5)
        assert torch.equal(other(x), gm(x))
