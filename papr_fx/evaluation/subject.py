"""A model under evaluation: built by name, with the preprocessing that its data needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, cast

import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from ..errors import ArgumentError, first_line
from ..planning import inputs
from ..proposals.named import is_timm_name
from ..proposals.statistics import Statistics
from ..tracing.fakes import MODEL_ERRORS
from ..video import pyav
from .decoders import VIDEO_SUFFIXES, ClipDecoder, ImageDecoder, Views
from .models import VIDEO_MODELS, image_model, video_model

_OWN = frozenset({"name", "pretrained", "checkpoint", "checkpoint_path"})  # options of ours


@dataclass(frozen=True)
class ModelSpec:
    """Which model is evaluated, and how it is built.

    `checkpoint`, `preprocessing`, `channels_last`, `classes` and `options` are for models of timm only, `views` for video
    classifiers only.

    Attributes:
        name: Name of a timm model as `image_model` takes it, else of a video classifier as `video_model` takes it.
        device: Where it runs; on the meta device it has no weights.
        pretrained: Whether weights may be loaded from a hub.
        checkpoint: A local file of weights.
        preprocessing: What differs from timm's data configuration, with the names of timm's validate.py: `img_size`,
            `crop_pct` and so on. Empty values count as not given.
        channels_last: Memory layout.
        classes: Number of classes, where it is not the model's own.
        options: Further options of `timm.create_model`.
        views: Which views of a video are evaluated.
    """

    name: str
    device: torch.device
    pretrained: bool = False
    checkpoint: str = ""
    preprocessing: Mapping[str, Any] = field(default_factory=dict[str, Any])
    channels_last: bool = False
    classes: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    views: Views = field(default_factory=Views)


@dataclass(frozen=True)
class Subject:
    """A model under evaluation.

    Attributes:
        model: In eval mode, on its device.
        example: An input of zeros: (1, C, H, W), or (1, T, C, H, W) for clips.
        decode: Decodes a file to one sample: pixels (C, H, W), or views (V, T, C, H, W).
        shape: Shape of a sample.
        suffixes: Suffixes of the files; empty for images.
        statistics: Mean and standard deviation of the pixels.
        config: What else the samples depend on.
        classes: Number of classes; 0 if the model does not state it.
        loaded: Whether weights were loaded, not drawn at random.
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


def named_subject(spec: ModelSpec) -> Subject:
    """Builds a model of timm if timm knows the name, else a video classifier.

    Raises:
        ArgumentError: There is no such model, or it does not take one of the options.
    """
    if is_timm_name(spec.name):
        return image_subject(spec)
    given = {
        "checkpoint": spec.checkpoint,
        "channels_last": spec.channels_last,
        "num_classes": spec.classes,
        "model_kwargs": spec.options,
        **spec.preprocessing,
    }
    unused = [option for option, value in given.items() if value]
    if unused:
        raise ArgumentError(f"--{unused[0].replace('_', '-')} is for models of timm, and {spec.name!r} is not one")
    return clip_subject(spec)


def image_subject(spec: ModelSpec) -> Subject:
    """Builds a model of timm, and timm's preprocessing of its images.

    Raises:
        ArgumentError: timm knows no such model, or its weights cannot be loaded.
    """
    options = {**spec.options, **({"num_classes": spec.classes} if spec.classes else {})}
    if taken := _OWN & options.keys():
        raise ArgumentError(f"{min(taken)} is no further option of timm.create_model here: it has one of its own")
    with _weights_device(spec):
        model = image_model(spec.name, pretrained=spec.pretrained, checkpoint=spec.checkpoint, **options).to(spec.device)
    given = {key: value for key, value in spec.preprocessing.items() if value}
    if "img_size" in given and hasattr(model, "set_input_size"):
        try:
            cast(Any, model).set_input_size(given["img_size"])
        except MODEL_ERRORS as error:
            raise ArgumentError(
                f"{spec.name} does not take images of {given['img_size']} pixels: {first_line(error)}"
            ) from error
    if spec.channels_last:
        cast(Any, model).to(memory_format=torch.channels_last)
    resolved: Mapping[str, Any] = resolve_data_config({**_image_size(spec.options), **given}, model=model)
    config: dict[str, Any] = {
        key: resolved[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    }
    shape = cast("tuple[int, ...]", tuple(config["input_size"]))
    return Subject(
        model=model,
        example=_example(model, shape),
        decode=ImageDecoder(cast(Any, create_transform(**config, is_training=False))),
        shape=shape,
        suffixes=(),
        statistics=(config["mean"], config["std"]),
        config=config,
        classes=int(getattr(model, "num_classes", 0)),
        loaded=spec.pretrained or bool(spec.checkpoint),
    )


def _image_size(options: Mapping[str, Any]) -> dict[str, Any]:
    """The size of the images that a model was made for, in timm's words."""
    size, channels = options.get("img_size"), options.get("in_chans", 3)
    if isinstance(size, int):
        size = size, size
    return {"input_size": (channels, *size)} if size else {"in_chans": channels}


def clip_subject(spec: ModelSpec) -> Subject:
    """Builds a video classifier, and the decoder of its views.

    Raises:
        ArgumentError: There is no such model, or none of that name with weights, or PyAV is not installed.
    """
    pyav()
    if spec.pretrained and spec.name in VIDEO_MODELS:
        raise ArgumentError(f"{spec.name} has random weights: with --pretrained give a name on transformers' hub")
    with _weights_device(spec):
        named = video_model(spec.name, pretrained=spec.pretrained)
    model = named.model.to(spec.device)
    clip = inputs.example_images(model, None)  # (1, T, C, H, W)
    views, size, frames = spec.views, clip.shape[-1], clip.shape[1]
    shape = (views.temporal * views.spatial, *clip.shape[1:])
    return Subject(
        model=model,
        example=_example(model, shape[1:]),
        decode=ClipDecoder(frames, size, named.statistics, views),
        shape=shape,
        suffixes=VIDEO_SUFFIXES,
        statistics=named.statistics,
        config={"views": [views.temporal, views.spatial], "step": views.step, "frames": frames, "size": size},
        classes=int(getattr(getattr(model, "config", None), "num_labels", 0)),
        loaded=spec.name not in VIDEO_MODELS,
    )


def _weights_device(spec: ModelSpec) -> torch.device:
    """Where the model is built: on a CPU, so that random weights do not depend on the device."""
    return torch.device("meta" if spec.device.type == "meta" else "cpu")


def _example(model: nn.Module, shape: Sequence[int]) -> Tensor:
    like = next(model.parameters())
    return torch.zeros((1, *shape), dtype=like.dtype, device=like.device)
