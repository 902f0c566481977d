"""Pixel operators of clip models: against the original models with masked branches."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.video.mvit import MSBlockConfig, MViT
from torchvision.models.video.swin_transformer import SwinTransformer3d

import papr_fx
from papr_fx.testing import check
from papr_fx.tracing.numerics import relative_error

from ..models import enliven
from ..models.clips import clip_proposal
from ..oracles import kept_by_hand, resized_by_hand


def swin() -> nn.Module:
    torch.manual_seed(0)
    model = SwinTransformer3d(
        patch_size=[2, 4, 4], embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=[2, 3, 3], num_classes=7
    )
    return enliven(model).double().eval()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("background", ["keep", "zero"])
@torch.no_grad()
def test_pixel_operators_equal_the_masked_model(background):
    model = swin()
    example = torch.zeros(1, 3, 6, 32, 48)
    gm = papr_fx.transform(model, clip_proposal(), 0.4, example_input=example, background=background)
    x = torch.randn(2, 3, 6, 32, 48, dtype=torch.float64)
    masks = papr_fx.keep_masks(gm, x)
    maps = clip_proposal().double().eval()(x).mean(1)
    assert list(masks) == [(3, 8, 12), (3, 4, 6)]
    for grid, mask in masks.items():
        assert torch.equal(mask, kept_by_hand(resized_by_hand(maps, grid), 0.4, 0))
    for stage in (0, 2):
        for block in model.features[stage]:

            def forward(x, block=block):
                mask = masks[tuple(x.shape[1:4])].unsqueeze(-1)  # (B, t, h, w, 1)
                x = x + block.attn(block.norm1(x))
                return (x * mask if background == "zero" else x) + block.mlp(block.norm2(x)) * mask

            block.forward = forward
    assert relative_error(gm(x), model(x)) < 1e-12
    other = torch.randn(1, 3, 8, 48, 32, dtype=torch.float64)  # the grid follows the clip
    assert list(papr_fx.keep_masks(gm, other)) == [(4, 12, 8), (4, 6, 4)]


def mvit() -> nn.Module:
    """A class token, pooling attention and a stage with half the rows and columns; the head reads only the class token."""

    def block(heads: int, width: int, out: int, stride: list[int]) -> MSBlockConfig:
        return MSBlockConfig(heads, width, out, [3, 3, 3], [3, 3, 3], stride, [1, 1, 1])

    torch.manual_seed(0)
    model = MViT(
        spatial_size=(32, 48),
        temporal_size=8,
        block_setting=[block(1, 8, 8, [1, 1, 1]), block(2, 8, 16, [1, 2, 2]), *[block(2, 16, 16, [1, 1, 1])] * 2],
        residual_pool=False,
        residual_with_cls_embed=True,
        rel_pos_embed=False,
        proj_after_attn=False,
        num_classes=7,
    )
    return enliven(model).double().eval()


@torch.no_grad()
def test_pixel_operators_with_a_class_token():
    model = mvit()
    gm = papr_fx.transform(model, clip_proposal(), 0.4, example_input=torch.zeros(1, 3, 8, 32, 48))
    x = torch.randn(2, 3, 8, 32, 48, dtype=torch.float64)
    masks = papr_fx.keep_masks(gm, x)
    maps = clip_proposal().double().eval()(x).mean(1)
    found = papr_fx.report(gm)
    assert [(site.name, site.grid, site.prefix) for site in found.sites] == [
        ("blocks.0.mlp", (4, 8, 12), 1),
        ("blocks.2.mlp", (4, 4, 6), 1),
        ("blocks.3.mlp", (4, 4, 6), 1),
    ]
    for site in found.sites:
        mask = kept_by_hand(resized_by_hand(maps, site.grid), 0.4, 0)
        assert torch.equal(mask, masks[site.grid])
        rows = F.pad(mask.flatten(1).double(), (1, 0), value=1.0).unsqueeze(-1)  # the class token stays
        model.get_submodule(site.name).register_forward_hook(lambda _m, _i, out, rows=rows: out * rows)
    assert relative_error(gm(x), model(x)) < 1e-12


@torch.no_grad()
def test_operators_whose_positions_do_not_matter_stay_dense():
    model = mvit()
    model.blocks = model.blocks[:3]  # the last grid has one block, and after it only the class token is read
    gm = papr_fx.transform(model, clip_proposal(), 0.4, example_input=torch.zeros(1, 3, 8, 32, 48))
    assert [site.name for site in papr_fx.report(gm).sites] == ["blocks.0.mlp"]
    assert "`blocks.2.mlp`: negative control" in str(papr_fx.report(gm))


class IsotropicBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv3d(6, 6, 3, padding=1, groups=6)
        self.mlp = nn.Sequential(nn.Conv3d(6, 12, 1), nn.GELU(), nn.Conv3d(12, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.mix(x))


def test_a_convnext_of_clips_with_one_grid():
    model = nn.Sequential(nn.Conv3d(3, 6, 2, 2), IsotropicBlock(), IsotropicBlock(), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    gm = papr_fx.transform(enliven(model).eval(), clip_proposal(), 0.5, example_input=torch.zeros(1, 3, 8, 12, 12))
    found = papr_fx.report(gm)
    assert (found.mode, {site.background for site in found.sites}) == ("pixels", {"zero"})
    assert check(model, clip_proposal(), 0.5, example_input=torch.zeros(1, 3, 8, 12, 12)).masked_branch < 1e-12
