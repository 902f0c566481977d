"""Normalisation inside a network: what happens to pixels before the first layer that mixes them.

It is found by what it does, whether a module (torchvision.transforms.Normalize), or arithmetic in a forward: the network is
run as far as its first convolution or linear layer, on images of one colour, and what arrives there is compared with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..tracing.fakes import MODEL_ERRORS, scratch_copy
from ..tracing.numerics import forked_random

_MIXING = frozenset({F.conv1d, F.conv2d, F.conv3d, F.linear, F.unfold, torch.matmul, Tensor.matmul, Tensor.__matmul__})
_TOLERANCE = 0.02  # of values near 1: half precision
Affine = tuple[Tensor, Tensor]  # scale and shift per channel, (C,) float64


class _Arrived(Exception):  # noqa: N818, no error
    """Stops the network at its first mixing layer."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class _StopAtMixing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _MIXING and args and isinstance(args[0], Tensor):
            raise _Arrived(args[0])
        return func(*args, **(kwargs or {}))


def normalisation_inside(network: nn.Module, images: Tensor, channel_axis: int) -> Affine | None:
    """Scale and shift per channel of what a network does to pixels before its first convolution.

    Args:
        network: The network. It is not changed.
        images: Images such as it takes. Only shape, dtype and device matter.
        channel_axis: Their axis of channels.

    Returns:
        None if pixels arrive as they are, or if what happens to them is no scale and shift per channel.
    """
    if images.is_meta:
        return None
    channels = images.shape[channel_axis]
    random = torch.Generator("cpu").manual_seed(0)
    colours = torch.rand((3, channels), generator=random, device="cpu", dtype=torch.float64) * 0.8 + 0.1
    if not images.is_floating_point():
        colours = (255 * colours).round()
    copied = scratch_copy(network).eval()
    arrived: list[Tensor] = []
    for colour in colours:
        found = _arriving(copied, _plain(images, colour, channel_axis), channels)
        if found is None:
            return None
        arrived.append(found)
    scale = (arrived[1] - arrived[0]) / (colours[1] - colours[0])
    shift = arrived[0] - scale * colours[0]
    close = (arrived[2] - (scale * colours[2] + shift)).abs() <= _TOLERANCE * (1 + arrived[2].abs())
    changed = bool(((scale - 1).abs() > _TOLERANCE).any() or (shift.abs() > _TOLERANCE).any())
    return (scale, shift) if changed and bool(close.all()) and bool((scale > 0).all()) else None


def _plain(images: Tensor, colour: Tensor, axis: int) -> Tensor:
    """One image of one colour."""
    shape = [1] * images.ndim
    shape[axis] = len(colour)
    return colour.view(shape).expand(1, *images.shape[1:]).to(images.device, images.dtype).contiguous()


def _arriving(network: Callable[[Tensor], object], images: Tensor, channels: int) -> Tensor | None:
    """The colour (C,) that arrives at the first mixing layer; None if no plain colour does."""
    try:
        with torch.no_grad(), forked_random(images), _StopAtMixing():
            network(images)
    except _Arrived as arrived:
        value = arrived.value
    except MODEL_ERRORS:  # tracing meets the same error, and names its node
        return None
    else:
        return None
    if value.ndim not in (4, 5) or value.shape[1] != channels:
        return None
    for axis in range(2, value.ndim):  # the middle, as some networks pad their images
        size = value.shape[axis]
        value = value.narrow(axis, size // 4, max(1, size // 2))
    pixels = value.double().movedim(1, -1).reshape(-1, channels).cpu()
    spread = (pixels.amax(0) - pixels.amin(0)).max()
    return pixels.mean(0) if float(spread) <= _TOLERANCE else None
