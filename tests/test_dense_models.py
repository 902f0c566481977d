"""Dense models of timm and transformers: depth, segmentation, poses, and backbones that hand out grids.

Token models are compared with the unpruned model in which dropped tokens are hidden from attention and leave
each block as their nearest kept token.
"""

import copy

import pytest
import timm
import torch
import transformers as hf
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.detection import FasterRCNN
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

import papr_fx
from papr_fx.tracing.numerics import relative_error, tensors_of

from .models import enliven, toy_proposal
from .models.dense import filled_by_hand

TINY = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
STAGES = {"out_features": ["stage1", "stage2"]}
FUSION = {"neck_hidden_sizes": [8, 8], "reassemble_factors": [2, 1], "fusion_hidden_size": 8}


def dinov2(**options) -> hf.PretrainedConfig:
    sizes = {"image_size": 56, "patch_size": 14, "num_hidden_layers": 2, **STAGES, **options}
    return hf.Dinov2Config(**TINY, **sizes)


def beit(**options) -> hf.PretrainedConfig:
    sizes = {"image_size": 64, "patch_size": 16, "num_hidden_layers": 4, "use_relative_position_bias": True, **options}
    return hf.BeitConfig(**TINY, **sizes)


def upernet(backbone: hf.PretrainedConfig, channels: int) -> nn.Module:
    sizes = {"hidden_size": 8, "pool_scales": [1, 2], "auxiliary_in_channels": channels, "auxiliary_channels": 8}
    return hf.UperNetForSemanticSegmentation(hf.UperNetConfig(backbone_config=backbone, **sizes))


class Intermediates(nn.Module):
    """Logits and the maps of both blocks, by one call of timm."""

    def __init__(self) -> None:
        super().__init__()
        options = {"img_size": 64, "embed_dim": 16, "num_heads": 2, "depth": 2, "num_classes": 5}
        self.model = timm.create_model("vit_tiny_patch16_224", **options)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        tokens, maps = self.model.forward_intermediates(x)
        return self.model.forward_head(tokens), maps


def features_only() -> nn.Module:
    options = {"img_size": 64, "embed_dim": 16, "num_heads": 2, "depth": 2, "out_indices": (0, 1)}
    return timm.create_model("vit_tiny_patch16_224", features_only=True, **options)


def dpt() -> nn.Module:
    sizes = {"image_size": 64, "patch_size": 16, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]}
    config = hf.DPTConfig(**TINY, **sizes, is_hybrid=False, neck_hidden_sizes=[8] * 4, fusion_hidden_size=8)
    return hf.DPTForDepthEstimation(config)


def depth_anything() -> nn.Module:
    sizes = {"reassemble_hidden_size": 16, "head_hidden_size": 8}
    return hf.DepthAnythingForDepthEstimation(
        hf.DepthAnythingConfig(backbone_config=dinov2(reshape_hidden_states=False), **FUSION, **sizes)
    )


def zoe() -> nn.Module:
    backbone = beit(out_features=[f"stage{i}" for i in range(1, 5)], reshape_hidden_states=False)
    sizes = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "bottleneck_features": 8, "num_relative_features": 8}
    return hf.ZoeDepthForDepthEstimation(hf.ZoeDepthConfig(backbone_config=backbone, **sizes))


def poses() -> nn.Module:
    sizes = {"image_size": [64, 48], "patch_size": [16, 16], "num_hidden_layers": 2, "out_features": ["stage2"]}
    backbone = hf.VitPoseBackboneConfig(**TINY, **sizes)
    return hf.VitPoseForPoseEstimation(hf.VitPoseConfig(backbone_config=backbone, scale_factor=4))


# How they are made, height and width of their images, where their blocks are, and how many layouts are restored.
MODELS = {
    "features_only": (features_only, (64, 64), "model.blocks", 2),
    "forward_intermediates": (Intermediates, (64, 64), "model.blocks", 2),
    "Dinov2Backbone": (lambda: hf.Dinov2Backbone(dinov2()), (56, 56), "encoder.layer", 2),
    "DPT": (dpt, (64, 64), "dpt.encoder.layer", 4),
    "DPT on DINOv2": (
        lambda: hf.DPTForDepthEstimation(hf.DPTConfig(backbone_config=dinov2(reshape_hidden_states=False), **FUSION)),
        (56, 56),
        "backbone.encoder.layer",
        2,
    ),
    "Depth-Anything": (depth_anything, (56, 56), "backbone.encoder.layer", 2),
    "UPerNet on DINOv2": (
        lambda: upernet(dinov2(num_hidden_layers=4, out_features=FOUR), 16),
        (56, 56),
        "backbone.encoder.layer",
        4,
    ),
    "UPerNet on BEiT": (
        lambda: hf.BeitForSemanticSegmentation(
            beit(num_hidden_layers=5, out_indices=[2, 3, 4, 5], pool_scales=[1, 2], use_auxiliary_head=False)
        ),
        (64, 64),
        "beit.layers",
        4,
    ),
    "ZoeDepth": (zoe, (64, 64), "backbone.beit.layers", 1),
    "masked images": (
        lambda: hf.ViTForMaskedImageModeling(hf.ViTConfig(**TINY, image_size=64, patch_size=16, num_hidden_layers=2)),
        (64, 64),
        "vit.layers",
        1,
    ),
    "poses": (poses, (64, 48), "backbone.encoder.layer", 1),
}
QUICK = ("features_only", "forward_intermediates", "Dinov2Backbone", "Depth-Anything")


def built(make, size: tuple[int, int]) -> tuple[nn.Module, Tensor]:
    return enliven(make()).double().eval(), torch.randn(2, 3, *size, dtype=torch.float64)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in MODELS])
@torch.no_grad()
def test_token_models(name):
    make, size, blocks, layouts = MODELS[name]
    model, x = built(make, size)
    model(x)  # transformers puts its hooks on the model when it first runs
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=x, mode="tokens")
    assert len(papr_fx.report(gm).restored) == layouts
    ((_, mask),) = papr_fx.keep_masks(gm, x).items()
    prefix = papr_fx.report(gm).sites[0].prefix
    dense = model(x)
    wanted = copy.deepcopy(model)
    with filled_by_hand(wanted, [f"{blocks}.{i}" for i in range(len(model.get_submodule(blocks)))], mask, prefix):
        expected, out = tensors_of(wanted(x)), tensors_of(gm(x))
    maps = [place for place, value in enumerate(expected) if value.ndim > 2]  # logits of pooled tokens are others
    assert maps
    for place in maps:
        assert out[place].shape == expected[place].shape
        assert relative_error(out[place], expected[place]) < 1e-9
        assert relative_error(out[place], tensors_of(dense)[place]) > 1e-4
    assert type(gm(x)) is type(dense)
    papr_fx.set_keep_ratio(gm, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(gm(x)), tensors_of(dense), strict=True))


def swin(**options) -> hf.PretrainedConfig:
    return hf.SwinConfig(
        embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 1, 2, 2], window_size=2, image_size=64, out_features=FOUR, **options
    )


FOUR = [f"stage{i}" for i in range(1, 5)]
CONVNEXT = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 32, 64], "out_features": FOUR}


WINDOWS = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64},
    **{"window_size": 2, "window_block_indices": [0]},
}


def segformer() -> nn.Module:
    sizes = {"hidden_sizes": [8, 16, 16, 16], "depths": [1] * 4, "num_attention_heads": [1, 2, 2, 2]}
    return hf.SegformerForSemanticSegmentation(hf.SegformerConfig(**sizes, decoder_hidden_size=16))


PIXELS = {
    "UPerNet on Swin": (lambda: upernet(swin(), 32), (64, 64)),
    "UPerNet on ConvNeXt": (lambda: upernet(hf.ConvNextConfig(**CONVNEXT), 32), (64, 64)),
    "SegFormer": (segformer, (96, 160)),
    "windows of VitDet": (lambda: hf.VitDetBackbone(hf.VitDetConfig(**WINDOWS)), (64, 64)),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if "Swin" in n else []) for n in PIXELS])
@torch.no_grad()
def test_pixel_models(name):
    make, size = PIXELS[name]
    model, x = built(make, size)
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=x, mode="pixels")
    dense, out = tensors_of(model(x)), tensors_of(gm(x))
    assert [value.shape for value in out] == [value.shape for value in dense]
    assert relative_error(out, dense) > 1e-4
    papr_fx.set_keep_ratio(gm, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(gm(x)), dense, strict=True))


class Stages(nn.Module):
    """The four stages of torchvision's Swin, (B, C, h, w) each."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = SwinTransformer([4, 4], 8, [1] * 4, [1, 1, 2, 2], [2, 2]).features

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = {}
        for place, part in enumerate(self.parts):
            x = part(x)
            if place % 2:
                maps[str(place)] = x.permute(0, 3, 1, 2)
        return maps


def convnext_stages() -> nn.Module:
    sizes = [CNBlockConfig(8 * 2**i, 16 * 2**i if i < 3 else None, 1) for i in range(4)]
    return IntermediateLayerGetter(ConvNeXt(sizes).features, {"1": "1", "3": "3", "5": "5", "7": "7"})


class Pyramid(nn.Module):
    """A body and its feature pyramid, as detectors of torchvision take it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.out_channels = body, 8
        self.fpn = FeaturePyramidNetwork([8, 16, 32, 64], 8, LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(self.body(x))


@pytest.mark.parametrize("make", [convnext_stages, pytest.param(Stages, marks=pytest.mark.slow)])
@torch.no_grad()
def test_detectors_of_torchvision(make):
    detector = FasterRCNN(Pyramid(enliven(make())), 3, min_size=64, max_size=64).eval()
    x = [torch.rand(3, 64, 64), torch.rand(3, 48, 64)]
    dense = detector(x)
    example = torch.zeros(1, 3, 64, 64)
    shapes = [value.shape for value in detector.backbone.body(example).values()]
    gm = papr_fx.transform(detector.backbone.body, toy_proposal(), 0.5, example_input=example, verify=False)
    assert [value.shape for value in gm(example).values()] == shapes
    detector.backbone.body = gm
    assert all(found["boxes"].isfinite().all() and len(found["boxes"]) == len(found["scores"]) for found in detector(x))
    papr_fx.set_keep_ratio(gm, 1.0)
    for found, before in zip(detector(x), dense, strict=True):
        assert all(torch.equal(found[key], before[key]) for key in before)
