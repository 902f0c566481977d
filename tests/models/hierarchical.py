"""Small hierarchical models of timm, torchvision and transformers, and how each runs with masked branches.

The masks act by hooks on the models' own modules and share no code with the rewrite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import timm
import torch
import transformers
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.convnext import ConvNeXt as TorchvisionConvNeXt
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

from .vits import enliven


@dataclass(frozen=True)
class Family:
    """How to build a small model, and where its blocks and their MLP branches are: read from the models' code.

    `last` names the module that a block applies to its output, after which a zero background is no longer zero.
    """

    build: Callable[[], nn.Module] | None
    block: str
    branch: str
    size: tuple[int, int] = (64, 64)
    natural: str = "keep"
    last: str = ""

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return enliven(self.build()).double().eval()


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
        last="norm3",
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
    """`value` with zeros at dropped positions. Rank 3 is (B, N, C); rank 4 has the grid in its middle or last axes."""
    if isinstance(value, tuple):  # transformers' layers also return attention weights
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
    """Runs the original model with masks: on block outputs for "zero", on MLP branches for "keep", on GRN's input for both."""

    def mask_input(module):
        return module.register_forward_pre_hook(lambda _m, inputs: (masked(inputs[0], masks),))

    def mask_output(module):
        return module.register_forward_hook(lambda _m, _i, out: masked(out, masks))

    blocks = [module for module in model.modules() if type(module).__name__ == family.block]
    norms = [module for module in model.modules() if type(module).__name__ in ("GlobalResponseNorm", "ConvNextV2GRN")]
    handles = [mask_input(module) for module in norms]
    for block in blocks:
        if background == "keep":
            handles.append(mask_output(block.get_submodule(family.branch)))
        elif family.last:
            handles.append(mask_input(block.get_submodule(family.last)))
        else:
            handles.append(mask_output(block))
    try:
        return model(x)
    finally:
        for handle in handles:
            handle.remove()


class Rolled(nn.Module):
    """Rolls its grid, mixes it, runs an MLP per position, and rolls it back."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = (shift, shift)
        self.mix = nn.Conv2d(8, 8, 3, padding=1)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        x = torch.roll(x.permute(0, 2, 3, 1), self.shift, (1, 2))
        x = x + self.mix(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.mlp(x)
        return torch.roll(x, (-self.shift[0], -self.shift[1]), (1, 2)).permute(0, 3, 1, 2)
