"""Checks of what `transform` gets, before anything is built: models, image shapes and options."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..errors import ArgumentError
from ..passes import splice_proposal
from ..proposals.network import takes_clips
from ..tracing.captures import is_capture
from ..versions import is_compiled
from .module import PrunedModule
from .signature import TRACED_OPTIONS

MODES = ("auto", "tokens", "pixels")
_RESERVED = ("plan", "meta", splice_proposal.PROPOSAL)
PIXEL_BACKGROUNDS = ("keep", "zero")
TOKEN_BACKGROUNDS = ("drop", "coarse")
BACKGROUNDS = ("auto", *PIXEL_BACKGROUNDS, *TOKEN_BACKGROUNDS)
OUTPUTS = ("logits", "features")
_LIKELY = {False: "1, 3, 224, 224", True: "1, 3, 16, 224, 224"}


class Request(NamedTuple):
    """A model to rewrite.

    Attributes:
        model: The model.
        images: Images or clips to trace it with, such as (1, C, H, W). Only shape, dtype and device matter.
        layout: Their axes by letter: BCHW; BCTHW or BTCHW for clips.
    """

    model: nn.Module
    images: Tensor
    layout: str


def checked_request(model: object, output: object, example_input: object, *, with_weights: bool) -> Request:
    """The model and the images to trace it with, checked.

    Args:
        model: The model.
        output: What the result returns, one of `OUTPUTS`.
        example_input: See `example_images`.
        with_weights: Whether the model must have weights.

    Raises:
        ArgumentError: One of them cannot be used.
    """
    checked = with_output(checked_model(model), checked_word("output", output, OUTPUTS))
    images = example_images(checked, example_input)
    if images.is_meta and with_weights:
        raise ArgumentError("model has no weights (meta device), so nothing can be proved on it: pass verify=False")
    return Request(checked, images, layout_of(checked, images))


def checked_model(model: object) -> nn.Module:
    """Returns `model` if it can be traced and copied safely, else raises `ArgumentError` with the fix."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"model must be a torch.nn.Module, not {type(model).__name__}; for a timm name call timm.create_model first"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentError("model is a ScriptModule, whose Python code is gone: pass the module that was scripted")
    if is_compiled(model) or any(m._compiled_call_impl is not None for m in model.modules()):
        raise ArgumentError(
            "model was already given to torch.compile: transform the plain module first, then torch.compile(gm)"
        )
    if any(kind.__module__.startswith("torch.export.") for kind in type(model).__mro__):
        raise ArgumentError(
            "model is an exported program, fixed in size and mode: transform the module, then export the result"
        )
    for name, module in model.named_modules():
        if is_compiled(module):
            raise ArgumentError(f"model.{name} was given to torch.compile: put the plain module there, then compile the result")
        if isinstance(module, PrunedModule):
            what = f"its submodule `{name}`" if name else "it"
            raise ArgumentError(
                f"model was already transformed ({what} is the result): use papr_fx.set_keep_ratio(gm, z) to change z"
            )
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ArgumentError(f"model is wrapped in {type(model).__name__}: transform model.module, then wrap the result")
    if any(isinstance(t, UninitializedParameter | UninitializedBuffer) for t in _tensors(model)):
        raise ArgumentError("model has lazy parameters without a shape: run it once first")
    members = {*model._modules, *model._parameters, *model._buffers}
    if taken := sorted(name for name in members if hasattr(PrunedModule, name) or name in _RESERVED):
        raise ArgumentError(f"model has members named {', '.join(taken)}, which a GraphModule needs for itself: rename them")
    if "forward" in vars(model):
        raise ArgumentError(
            "model.forward was replaced on the instance: define it in a class, for instance one that wraps the model"
        )
    _check_takes_images(model)
    check_no_hooks(model, "model")
    config = getattr(model, "config", None)
    for option, wanted in TRACED_OPTIONS.items():
        if getattr(config, option, wanted) is not wanted:
            raise ArgumentError(
                f"model.config.{option} is {not wanted}: a graph returns what the model does with {option}={wanted}. Set it so"
            )
    devices = sorted({str(t.device) for t in _tensors(model)})
    if len(devices) > 1:
        raise ArgumentError(f"model lies on several devices ({', '.join(devices)}): move it to one first")
    return model


def _check_takes_images(model: nn.Module) -> None:
    """Refuses a model of several modalities, such as CLIPModel, by the name of its image tower."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    if "pixel_values" not in names[1:]:
        return
    towers = [
        name
        for name, child in model.named_children()
        if list(inspect.signature(type(child).forward).parameters)[1:2] == ["pixel_values"]
    ]
    hint = f"pass {' or '.join(f'model.{name}' for name in towers)}" if towers else "pass its image tower"
    raise ArgumentError(f"{type(model).__name__} takes {names[0]} before its images: {hint}, and put the result in its place")


def with_output(model: nn.Module, output: str) -> nn.Module:
    """The model itself for "logits"; for "features" a model over the same modules that returns its `forward_features`.

    Raises:
        ArgumentError: The model has no `forward_features`.
    """
    if output == "logits":
        return model
    kind = type(model)
    if not hasattr(kind, "forward_features"):
        raise ArgumentError(
            f"output='features' calls forward_features, a method of timm's models, but {kind.__name__} has none: pass the "
            "backbone itself, whose output is its features"
        )
    headless = copy.copy(model)
    headless.__class__ = type(kind.__name__, (kind,), {"forward": cast(Any, kind).forward_features})
    return headless


def check_no_hooks(module: nn.Module, name: str) -> None:
    """Raises `ArgumentError` if a module that must be traced through has forward hooks."""
    if module._forward_pre_hooks or not all(is_capture(hook) for hook in module._forward_hooks.values()):
        raise ArgumentError(
            f"{name} has forward hooks, which a graph of its forward would not run: remove them before transform()"
        )


def example_images(model: nn.Module, given: object) -> Tensor:
    """Images or clips to trace with, in a dtype that the model takes and on its device. Their content does not matter.

    Args:
        model: The model.
        given: A batch (B, C, H, W), (B, C, T, H, W) or (B, T, C, H, W), or None to read the shape from the model's own
            attributes or its timm or transformers configuration.

    Raises:
        ArgumentError: `given` is no such batch, or None and the model states no size.
    """
    if given is None:
        shape = (1, *_frames(model), _channels(model), *_image_size(model))
    elif not isinstance(given, Tensor):
        raise ArgumentError(f"example_input must be a tensor (B, C, H, W), not {type(given).__name__}")
    elif given.ndim not in (4, 5) or 0 in given.shape:
        raise ArgumentError(
            f"example_input must be a batch of images (B, C, H, W), or of clips (B, C, T, H, W) or (B, T, C, H, W), not "
            f"{tuple(given.shape)}"
        )
    else:
        shape = tuple(given.shape)
    device = next((t.device for t in _tensors(model)), None)
    return torch.zeros(shape, dtype=_dtype(model, given), device=device)


def layout_of(model: nn.Module, images: Tensor) -> str:
    """Axes of a model's input, by letter: BCHW for images, BCTHW or BTCHW for clips of T frames.

    Raises:
        ArgumentError: Clips with as many frames as channels, or with another number of channels than the model takes.
    """
    if images.ndim == 4:
        return "BCHW"
    likely = dict.fromkeys((_channels(model, nn.Conv3d), _channels(model, nn.Conv2d), 3))
    for channels in likely:
        found = [layout for layout in ("BCTHW", "BTCHW") if images.shape[layout.index("C")] == channels]
        if len(found) == 1:
            return found[0]
    raise ArgumentError(
        f"clips {tuple(images.shape)} do not tell frames from the {next(iter(likely))} channels: pass example_input with "
        "another number of frames, as (B, C, T, H, W) or (B, T, C, H, W)"
    )


def checked_word(name: str, value: object, words: Iterable[str]) -> str:
    """Returns `value` if it is one of `words`, else raises `ArgumentError`."""
    known = tuple(words)
    if not isinstance(value, str) or value not in known:
        raise ArgumentError(f"{name} must be one of {', '.join(map(repr, known))}, not {value!r}")
    return value


def checked_size(size: object, images: Tensor) -> int | tuple[int, ...] | None:
    """Returns `proposal_size` if it is None, a number of pixels or a size for such images, else raises `ArgumentError`."""
    if size is None:
        return None
    sides = list(cast("tuple[object, ...]", size)) if isinstance(size, tuple | list) else [size]
    valid = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)
    ranks = (2, 3)[: images.ndim - 3]  # of images (rows, columns), of clips (frames, rows, columns) too
    if not valid or len(sides) not in (ranks if isinstance(size, tuple | list) else (1,)):
        frames = ", or (frames, rows, columns)" if 3 in ranks else ""
        raise ArgumentError(
            f"proposal_size must be a shorter side in pixels, or (rows, columns){frames}, each above 0; not {size!r}"
        )
    numbers = tuple(cast("list[int]", sides))
    return numbers if isinstance(size, tuple | list) else numbers[0]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _dtype(model: nn.Module, given: Tensor | None) -> torch.dtype:
    """The dtype of a model's images: that of `given` if it is no floating one or if parameters have it, else that of most."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in _tensors(model):
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.numel()
    if given is not None and (not given.is_floating_point() or given.dtype in sizes):
        return given.dtype
    return next((dtype for dtype, _ in sizes.most_common(1)), torch.get_default_dtype())


def _image_size(model: nn.Module) -> tuple[int, int]:
    config = getattr(model, "config", None)  # of a transformers model
    for holder in (model, *model.children(), config, getattr(config, "vision_config", None)):
        for attribute in ("img_size", "image_size", "crop_size"):
            size = getattr(holder, attribute, None)
            if isinstance(size, int):
                return size, size
            if isinstance(size, tuple | list) and len(cast("tuple[int, ...]", size)) == 2:
                return cast("tuple[int, int]", tuple(cast("tuple[int, ...]", size)))
    pretrained = getattr(model, "pretrained_cfg", None)
    if isinstance(pretrained, Mapping) and pretrained.get("input_size"):
        return cast("tuple[int, int]", tuple(cast(Any, pretrained)["input_size"][1:]))
    raise ArgumentError(
        f"{type(model).__name__} states no image size (img_size, image_size, or in its timm or transformers configuration): "
        f"pass example_input=torch.zeros({_LIKELY[takes_clips(model)]})"
    )


def _frames(model: nn.Module) -> tuple[int, ...]:
    """The number of frames of a clip model of transformers, whose clips are (B, T, C, H, W); empty for images."""
    config = getattr(model, "config", None)
    for attribute in ("num_frames", "frames_per_clip"):
        frames = getattr(config, attribute, None)
        if isinstance(frames, int):
            return (frames,)
    return ()


def _channels(model: nn.Module, *kinds: type[nn.Conv2d | nn.Conv3d]) -> int:
    """Input channels of the first convolution; 3 if there is none."""
    for module in model.modules():
        if isinstance(module, kinds or (nn.Conv2d, nn.Conv3d)):
            return module.in_channels
    return 3
