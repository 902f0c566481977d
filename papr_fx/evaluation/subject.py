"""A model by name as it is evaluated: with what its data must look like, its proposal, and its pruned forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

import timm
import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from ..errors import ArgumentError, first_line
from ..passes.reduce_tokens import Reduction
from ..planning import inputs
from ..planning.module import sibling
from ..proposals.named import LITE0
from ..proposals.statistics import Statistics
from ..review.report import report
from ..tracing.fakes import MODEL_ERRORS
from ..tracing.macs import count_module_macs
from ..transform import transform
from ..video import pyav
from .data import VIDEO_SUFFIXES, ClipDecoder, ImageDecoder
from .models import VIDEO_MODELS, image_model, proposal_for, video_model


@dataclass(frozen=True)
class Subject:
    """A model under evaluation.

    Attributes:
        model: In eval mode, on its device.
        example: What it takes, (1, C, H, W), or (1, T, C, H, W) for clips.
        decode: A file to one sample: pixels (C, H, W), or views (V, T, C, H, W).
        shape: Shape of a sample.
        suffixes: Endings of such files; none stands for images.
        statistics: Mean and standard deviation of pixels.
        config: What else the samples depend on.
        classes: How many it tells apart; 0 where it does not say.
        loaded: Whether its weights were loaded, not drawn.
    """

    model: nn.Module
    example: Tensor
    decode: Callable[[IO[bytes]], Tensor]
    shape: tuple[int, ...]
    suffixes: tuple[str, ...]
    statistics: Statistics
    config: Mapping[str, Any]
    classes: int
    loaded: bool

    @property
    def views(self) -> bool:
        """Whether a sample is several views."""
        return len(self.shape) == 5


@dataclass(frozen=True)
class Variant:
    """One form of a subject.

    Attributes:
        module: The model.
        macs: Multiply-accumulates of one image or view, the proposal included.
        z: Keep ratio; 1 for the dense model.
        r: Tokens that are merged in a block.
    """

    module: nn.Module
    macs: int
    z: float = 1.0
    r: int = 0

    @property
    def name(self) -> str:
        """Tells it from the other forms."""
        return f"z={self.z:g} r={self.r}"


def named_subject(
    name: str,
    *,
    device: torch.device,
    pretrained: bool,
    checkpoint: str,
    data: Mapping[str, Any],
    channels_last: bool,
    views: Mapping[str, int],
    **options: Any,
) -> Subject:
    """A model of timm where that knows the name, else a video classifier.

    Args:
        name: The name.
        device: Where it is to run.
        pretrained: Whether a hub may be asked for weights.
        checkpoint: As for `image_subject`, as are `data`, `channels_last` and `options`.
        data: Images alone.
        channels_last: Images alone.
        views: As for `clip_subject`: `temporal`, `spatial` and `step`.
        **options: Given to timm.

    Raises:
        ArgumentError: There is no such model, or it has no use for an option.
    """
    if timm.is_model(name):
        return image_subject(
            name,
            device=device,
            pretrained=pretrained,
            checkpoint=checkpoint,
            data=data,
            channels_last=channels_last,
            **options,
        )
    given = {"checkpoint": checkpoint, "channels_last": channels_last, **data, **options}
    useless = [word for word, value in given.items() if value]
    if useless:
        raise ArgumentError(f"--{useless[0].replace('_', '-')} is for models of timm, and {name!r} is none")
    return clip_subject(name, device=device, pretrained=pretrained, **views)


def image_subject(
    name: str,
    *,
    device: torch.device,
    pretrained: bool = False,
    checkpoint: str = "",
    data: Mapping[str, Any] | None = None,
    channels_last: bool = False,
    **options: Any,
) -> Subject:
    """A model of timm, and images as timm prepares them for it.

    Args:
        name: Its name.
        device: Where it is to run.
        pretrained: Whether timm's hub may be asked for weights.
        checkpoint: A local file of weights.
        data: What of timm's data configuration is to differ, in words of timm's validate.py: `img_size`, `crop_pct` and so on.
        channels_last: Memory layout.
        **options: Given to timm.

    Raises:
        ArgumentError: timm knows no such model, or its weights cannot be loaded.
    """
    with torch.device("meta" if device.type == "meta" else "cpu"):
        model = image_model(name, pretrained=pretrained, checkpoint=checkpoint, **options).to(device)
    given = {key: value for key, value in (data or {}).items() if value}
    if "img_size" in given and hasattr(model, "set_input_size"):
        try:
            cast(Any, model).set_input_size(given["img_size"])
        except MODEL_ERRORS as error:
            raise ArgumentError(f"{name} does not take images of {given['img_size']} pixels: {first_line(error)}") from error
    if channels_last:
        cast(Any, model).to(memory_format=torch.channels_last)
    known: Mapping[str, Any] = resolve_data_config(given, model=model)
    config: dict[str, Any] = {
        key: known[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    }
    decode = ImageDecoder(cast(Any, create_transform(**config, is_training=False)))
    shape = cast("tuple[int, ...]", tuple(config["input_size"]))
    statistics = config["mean"], config["std"]
    loaded = pretrained or bool(checkpoint)
    classes = int(getattr(model, "num_classes", 0))
    return Subject(model, _example(model, shape), decode, shape, (), statistics, config, classes, loaded)


def clip_subject(
    name: str, *, device: torch.device, pretrained: bool = False, temporal: int = 5, spatial: int = 3, step: int = 4
) -> Subject:
    """A video classifier as `video_model` names it, and the views of a video (PaPr, Sec. 4: 5 clips x 3 crops).

    Args:
        name: As for `video_model`.
        device: Where it is to run.
        pretrained: Whether transformers' hub may be asked.
        temporal: Clips of a video.
        spatial: Crops of a clip.
        step: Every how manyth frame is taken.

    Raises:
        ArgumentError: There is no such model, or none of that name with weights, or PyAV is not installed.
    """
    pyav()
    if pretrained and name in VIDEO_MODELS:
        raise ArgumentError(f"{name} has random weights: with --pretrained give a name on transformers' hub")
    with torch.device("meta" if device.type == "meta" else "cpu"):
        named = video_model(name, pretrained=pretrained)
    model = named.model.to(device)
    like = inputs.example_images(model, None)  # (1, T, C, H, W)
    size, frames = like.shape[-1], like.shape[1]
    decode = ClipDecoder(frames, size, named.statistics, step=step, temporal=temporal, spatial=spatial)
    shape = (temporal * spatial, *like.shape[1:])
    config = {"views": [temporal, spatial], "step": step, "frames": frames, "size": size}
    classes = int(getattr(getattr(model, "config", None), "num_labels", 0))
    example, loaded = _example(model, shape[1:]), name not in VIDEO_MODELS
    return Subject(model, example, decode, shape, VIDEO_SUFFIXES, named.statistics, config, classes, loaded)


def _example(model: nn.Module, shape: Sequence[int]) -> Tensor:
    like = next(model.parameters())
    return torch.zeros((1, *shape), dtype=like.dtype, device=like.device)


def proposal_of(
    subject: Subject,
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: str = "",
    size: int | tuple[int, ...] | None = None,
    shared: bool = False,
    saliency: Any = "psm",
) -> tuple[nn.Module, dict[str, Any]]:
    """A proposal by name, and what `transform` is told of it.

    Raises:
        ProposalError: No library that is installed knows it, or its weights cannot be loaded.
    """
    if name == LITE0 and checkpoint:
        raise ArgumentError(f"--proposal-checkpoint: {LITE0} brings its weights along; name another --proposal")
    proposal, known = proposal_for(subject.statistics, name, pretrained=pretrained, checkpoint=checkpoint)
    return proposal, {"proposal_size": size, "input_stats": "shared" if shared else known, "saliency": saliency}


def dense(subject: Subject) -> Variant:
    """The model itself.

    Raises:
        ArgumentError: It does not take inputs of that shape.
    """
    try:
        return Variant(subject.model, count_module_macs(subject.model, subject.example))
    except MODEL_ERRORS as error:
        shape = tuple(subject.example.shape)
        raise ArgumentError(f"the model does not take inputs of shape {shape}: {first_line(error)}") from error


def pruned(
    subject: Subject,
    proposal: nn.Module,
    ratios: Sequence[float],
    *,
    merge: Reduction | None = None,
    **options: Any,
) -> list[Variant]:
    """Its form at each keep ratio; `options` are further ones of `transform`, whose errors are raised.

    A model without values, on the meta device, is not proved.
    """
    if not ratios:
        return []
    verify = not subject.example.is_meta
    gm = transform(subject.model, proposal, ratios[0], example_input=subject.example, merge=merge, verify=verify, **options)
    found: list[Variant] = []
    for z in ratios:
        module = sibling(gm, z=z)
        found.append(Variant(module, report(module).total_macs, z, merge.r if merge else 0))
    return found
