"""Normalisation statistics: how pixels normalised for the model are normalised again for the proposal.

`input_stats="auto"` reads timm's metadata, also inside wrappers, a normalisation inside a network, and the defaults of
torchvision, transformers and open_clip. `transform` warns (`StatisticsWarning`) where only one of the two is known: where the
model's are unknown, or those of a proposal that is a classifier.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..tracing.wrappers import unwrapped
from .front import Affine, normalisation_inside
from .packages import Known, stated

Statistics = tuple[Sequence[float], Sequence[float]]  # mean and std per channel
InputStats = Literal["auto", "shared"] | tuple[Statistics, Statistics]
_BYTES = 0.1  # a network that scales its input by less than this takes pixels of 0..255


@dataclass(frozen=True)
class Renormalisation:
    """What happens to the images for the proposal.

    Attributes:
        factors: Scale and shift, (C,) float64 each; None where images stay as they are.
        words: The same in words, for `report`.
        unknown: Of which network the statistics are unknown while the other's are known: "model", "proposal" or "".
    """

    factors: Affine | None
    words: str
    unknown: Literal["", "model", "proposal"] = ""


@dataclass(frozen=True)
class Network:
    """A network, with images such as it takes and their axis of channels."""

    module: nn.Module
    images: Tensor
    channel_axis: int

    @property
    def name(self) -> str:
        """Its class."""
        return type(self.module).__name__

    @property
    def channels(self) -> int:
        """Channels of its images."""
        return self.images.shape[self.channel_axis]


def statistics_of(module: nn.Module) -> Statistics | None:
    """Mean and std per channel that a network or a part of it states; None if none does, or parts disagree."""
    found = _stated_inside(module)
    return None if found is None else (found.mean, found.std)


def checked_stats(given: object, channels: int) -> InputStats:
    """`input_stats` of `transform`: one of its words, or a user's statistics as numbers, for images of that many channels.

    Raises:
        ArgumentError: It has another form, or another number of channels.
    """
    if isinstance(given, str) and given in ("auto", "shared"):
        return given
    try:
        (mean, std), (own_mean, own_std) = cast(Any, given)
        lists = [[float(v) for v in part] for part in (mean, std, own_mean, own_std)]
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f'input_stats must be "auto", "shared" or ((mean, std) of the model, (mean, std) of the proposal), not {given!r}'
        ) from error
    if any(len(part) != channels for part in lists) or not all(0 < v < math.inf for v in lists[1] + lists[3]):
        raise ArgumentError(f"input_stats: each mean and std needs {channels} numbers, each std above 0; got {given!r}")
    return (lists[0], lists[1]), (lists[2], lists[3])


def renormalisation(model: Network, proposal: Network, given: InputStats) -> Renormalisation:
    """How pixels normalised for `model` become pixels normalised for `proposal`.

    Args:
        model: The target, which "auto" reads.
        proposal: The network, which "auto" reads.
        given: `input_stats` of `transform`, checked.
    """
    if given == "shared":
        return Renormalisation(None, "shared: the proposal gets the model's images")
    if given != "auto":
        (mean, std), (own_mean, own_std) = given
        return _between(Known(tuple(mean), tuple(std), "given"), Known(tuple(own_mean), tuple(own_std), "given"))
    known, own = _of(model), _of(proposal)
    if known is not None and own is not None:
        return _between(known, own)
    unknown = [network.name for network, found in ((model, known), (proposal, own)) if found is None]
    words = f"unknown for {' and '.join(unknown)}: the proposal gets the model's images"
    if known is None and own is None:
        return Renormalisation(None, words)
    return Renormalisation(None, words, "model" if known is None else "proposal")


def _between(known: Known, own: Known) -> Renormalisation:
    """From the statistics of the model to those of the proposal."""
    if (known.mean, known.std) == (own.mean, own.std):
        return Renormalisation(None, f"the same for both: {_words(known)}")
    mean, std, own_mean, own_std = (_tensor(v) for v in (known.mean, known.std, own.mean, own.std))
    return Renormalisation((std / own_std, (mean - own_mean) / own_std), f"model {_words(known)}; proposal {_words(own)}")


def _tensor(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, device="cpu", dtype=torch.float64)


def _words(known: Known) -> str:
    mean, std = (", ".join(f"{value:.3g}" for value in part) for part in (known.mean, known.std))
    return f"mean ({mean}), std ({std}) ({known.source})"


def _of(network: Network) -> Known | None:
    """The statistics of the pixels that a network takes: those of what it wraps, less what it normalises itself."""
    known = _stated_inside(network.module)
    if known is not None and {len(known.mean), len(known.std)} != {network.channels}:
        known = None
    inside = normalisation_inside(network.module, network.images, network.channel_axis)
    if inside is None:
        return known
    scale, shift = inside
    if known is None:  # what arrives is normalised, so pixels lie in [0, 1], or in 0..255
        std = 1 / 255 if float(scale.max()) < _BYTES else 1.0
        return Known((0.0,) * len(scale), (std,) * len(scale), "normalised inside")
    mean, std = _tensor(known.mean), _tensor(known.std)
    outer_mean = tuple(round(float(value), 6) + 0.0 for value in mean + std * shift)
    outer_std = tuple(float(f"{float(value):.6g}") for value in std * scale)
    return Known(outer_mean, outer_std, f"{known.source}, normalised inside")


def _stated_inside(module: nn.Module) -> Known | None:
    """What a module, what it wraps, or the only kind of its parts that states something says."""
    for inner in unwrapped(module):
        if known := stated(inner):
            return known
    parts = {(known.mean, known.std): known for known in _outermost(module)}
    return next(iter(parts.values())) if len(parts) == 1 else None


def _outermost(module: nn.Module) -> list[Known]:
    """What the outermost modules that state something say."""
    if known := stated(module):
        return [known]
    return [known for child in module.children() for known in _outermost(child)]
