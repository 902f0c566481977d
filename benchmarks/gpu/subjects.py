"""The models that are measured, whole, and tiny for a dry run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

import papr_fx
from papr_fx.evaluation.models import video_model
from papr_fx.planning.inputs import example_images
from papr_fx.planning.module import PrunedModule
from papr_fx.tracing.numerics import redraw


@dataclass(frozen=True)
class Subject:
    """A model and the keep ratio at which it is pruned.

    Attributes:
        model: Its name in timm, or among `video_model`'s.
        z: Keep ratio.
        tiny: Options of timm, or of VideoMAE's configuration, that make it tiny.
        tiny_model: Another model's name for the dry run, if need be.
        tokens: Whether it is pruned by tokens; else by pixels.
    """

    model: str
    z: float
    tiny: dict[str, Any] = field(default_factory=dict[str, Any])
    tiny_model: str = ""
    tokens: bool = True

    @property
    def clips(self) -> bool:
        """Whether it takes clips."""
        return self.model.startswith("videomae")

    def build(self, *, tiny: bool) -> nn.Module:
        """The model in eval mode, with random weights, on the CPU."""
        if not self.clips:
            name, options = (self.tiny_model or self.model, self.tiny) if tiny else (self.model, {})
            return timm.create_model(name, **options).eval()
        if not tiny:
            return video_model(self.model, pretrained=False).model
        from transformers import VideoMAEConfig, VideoMAEForVideoClassification

        return VideoMAEForVideoClassification(VideoMAEConfig(**self.tiny)).eval()


_TINY_VIT = {"depth": 1, "img_size": 64}
SUBJECTS = {
    "ViT-B": Subject("vit_base_patch16_224", 0.5, _TINY_VIT, "vit_tiny_patch16_224"),
    "ConvNeXt-B": Subject("convnext_base", 0.65, {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, tokens=False),
    "Swin-B": Subject(
        "swin_base_patch4_window7_224",
        0.65,
        {"img_size": 64, "embed_dim": 32, "depths": (1, 1), "num_heads": (2, 4)},
        tokens=False,
    ),
    "VideoMAE-B": Subject(
        "videomae_base",
        0.45,
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 64}
        | {"num_frames": 4, "num_labels": 10},
    ),
    "EVA-02-B": Subject("eva02_base_patch14_224", 0.5, {"depth": 1, "img_size": 56}, "eva02_tiny_patch14_224"),
    "ViT-L": Subject("vit_large_patch16_224", 0.5, _TINY_VIT, "vit_tiny_patch16_224"),
    "ViT-S": Subject("vit_small_patch16_224", 0.5, _TINY_VIT, "vit_tiny_patch16_224"),
    "ViT-L@384": Subject("vit_large_patch16_384", 0.5, _TINY_VIT, "vit_tiny_patch16_224"),
}


def images_for(model: nn.Module, batch: int, *, tiny: bool) -> Tensor:
    """Images or clips with smooth shapes of all sizes, so that few scores tie, in the dtype and on the device of `model`."""
    size = 56 if hasattr(model, "rope") else 64
    given = torch.zeros(1, 3, size, size) if tiny and not hasattr(model, "config") else None
    like = example_images(model, given)
    random = torch.Generator().manual_seed(1)
    shape = (batch, *like.shape[1:])
    coarse = [torch.randn((batch, *like.shape[1:-2], side, side), generator=random) for side in (4, 8, 16)]
    flat = [torch.nn.functional.interpolate(c.flatten(0, -4), size=like.shape[-2:], mode="bilinear") for c in coarse]
    images = sum(f.view(shape) for f in flat) + 0.3 * torch.randn(shape, generator=random)
    weight = next(model.parameters())
    return images.to(weight.device, weight.dtype)


def at_unit_scale(model: nn.Module) -> nn.Module:
    """The model with parameters that hide no fault: fresh ones may be zero, or nearly so."""
    values = redraw(model, torch.Generator().manual_seed(0), torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in values:
                parameter.copy_(values[name])
    return model


@dataclass(frozen=True)
class Sight:
    """A proposal network with random weights, and how many pixels of a side it sees."""

    network: str = "mobileone_s0"
    pixels: int = 224

    def tiny(self) -> Sight:
        """A tiny one."""
        return Sight("test_resnet", {224: 64, 160: 48}[self.pixels])

    def prune(self, model: nn.Module, images: Tensor, z: float, **options: Any) -> PrunedModule:
        """The model pruned; `options` are those of `transform`."""
        network = _normalised(timm.create_model(self.network), images)
        size = None if self.pixels == images.shape[-2] else self.pixels
        options = {"verify": False, **options}
        return papr_fx.transform(model, network, z, example_input=images[:1], proposal_size=size, **options)


def _normalised(network: nn.Module, images: Tensor) -> nn.Module:
    """The network with the statistics of these images in its batch norms: fresh ones let values fade to nothing in float16."""
    frames = images if images.ndim == 4 else images.flatten(0, 1)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the plain mean
    network.to(images.device).train()
    with torch.no_grad():
        network(frames[:8].to(next(network.parameters()).dtype))
    return network.eval()
