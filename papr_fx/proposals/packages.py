"""What a module says about the pixels that it takes: rules that read what the module carries, not a list of models."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from .named import LITE0_STATISTICS, PYTORCHVIDEO_STATISTICS


@dataclass(frozen=True)
class Known:
    """How the pixels of a network are normalised: (pixel in [0, 1] - mean) / std.

    Attributes:
        mean: Per channel.
        std: Per channel.
        source: Where this is stated.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str


def stated(module: nn.Module) -> Known | None:
    """What a module itself says, without its children; None if it says nothing."""
    config = getattr(module, "config", None)
    for holder in (module, config):  # transformers' TimmWrapper keeps timm's metadata in its configuration
        pretrained = getattr(holder, "pretrained_cfg", None)
        if isinstance(pretrained, Mapping):
            found = _known(cast(Any, pretrained).get("mean"), cast(Any, pretrained).get("std"), "pretrained_cfg")
            if found:
                return found
    given = _known(getattr(module, "image_mean", None), getattr(module, "image_std", None), "image_mean")  # open_clip
    return given or next((found for kind in type(module).__mro__ if (found := _by_package(kind, module))), None)


def _known(mean: object, std: object, source: str) -> Known | None:
    """The statistics, if both are sequences of numbers."""
    lists = [cast("Sequence[Any]", part) for part in (mean, std) if isinstance(part, Sequence) and not isinstance(part, str)]
    if len(lists) < 2 or not all(part and all(isinstance(v, int | float) for v in part) for part in lists):
        return None
    return Known(tuple(map(float, lists[0])), tuple(map(float, lists[1])), source)


def _by_package(kind: type, module: nn.Module) -> Known | None:
    """The rule of the package that defines a class."""
    package = kind.__module__.split(".")
    if package[:2] == ["torchvision", "models"] and package[2:3] not in (["detection"], ["optical_flow"]):
        return _torchvision(kind.__module__, module)
    if package[:2] == ["transformers", "models"]:
        return _transformers(package[2], module)
    if package[0] == "efficientnet_lite_pytorch":
        return Known(*LITE0_STATISTICS, "EfficientNet-Lite's")
    if package[:2] == ["pytorchvideo", "models"]:
        return Known(*PYTORCHVIDEO_STATISTICS, "pytorchvideo's")
    return None


def _torchvision(defined_in: str, module: nn.Module) -> Known | None:
    """What the weights of torchvision's models of this kind take: those of this size, else all. ImageNet's if they differ."""
    if defined_in == "torchvision.models.feature_extraction":
        return None  # a graph of any model
    from torchvision.models import WeightsEnum

    enums = [e for e in vars(sys.modules[defined_in]).values() if isinstance(e, type) and issubclass(e, WeightsEnum)]
    weights = [cast(Any, entry) for enum in enums for entry in enum]
    size = sum(parameter.numel() for parameter in module.parameters())
    alike = [entry for entry in weights if entry.meta.get("num_params") == size] or weights
    presets = [entry.transforms() for entry in alike]
    found = {(tuple(preset.mean), tuple(preset.std)) for preset in presets if hasattr(preset, "mean")}
    mean, std = found.pop() if len(found) == 1 else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return Known(mean, std, "torchvision's")


def _transformers(folder: str, module: nn.Module) -> Known | None:
    """The defaults of the image processor that transformers ships for this kind of model."""
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    names = cast("Mapping[str, Any]", IMAGE_PROCESSOR_MAPPING_NAMES)
    kind = getattr(getattr(module, "config", None), "model_type", folder)
    listed = names.get(kind) or names.get(folder) or {}
    for name in listed.values() if isinstance(listed, Mapping) else listed:
        processor = getattr(transformers, name, None) if name else None
        known = _known(getattr(processor, "image_mean", None), getattr(processor, "image_std", None), f"{name}'s")
        if known:
            return _rescaled(known, processor)
    return None


def _rescaled(known: Known, processor: object) -> Known:
    """For pixels in [0, 1], where a processor takes bytes times its own factor, perhaps less 1."""
    factor = 255 * float(getattr(processor, "rescale_factor", 1 / 255) or 1 / 255)
    offset = 1.0 if getattr(processor, "offset", False) or getattr(processor, "rescale_offset", False) else 0.0
    mean = tuple((value + offset) / factor for value in known.mean)
    return Known(mean, tuple(value / factor for value in known.std), known.source)
