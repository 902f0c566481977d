"""Normalisation statistics: how pixels normalised for the model are normalised again for the proposal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..errors import ArgumentError

Statistics = tuple[Sequence[float], Sequence[float]]  # mean and std per channel
InputStats = Literal["auto", "shared"] | tuple[Statistics, Statistics]


def statistics_of(module: nn.Module) -> Statistics | None:
    """Mean and std per channel from timm's metadata; None without it, as for modules of torchvision and transformers."""
    config = getattr(module, "pretrained_cfg", None)
    if isinstance(config, Mapping) and config.get("mean") and config.get("std"):
        return tuple(cast(Any, config)["mean"]), tuple(cast(Any, config)["std"])
    return None


def renormalisation(model: nn.Module, proposal: nn.Module, channels: int, given: InputStats) -> tuple[Tensor, Tensor] | None:
    """Scale and shift, (C,) float64 each, that take pixels normalised for `model` to pixels normalised for `proposal`.

    Args:
        model: The target, whose metadata "auto" reads.
        proposal: The network whose metadata "auto" reads.
        channels: C.
        given: `input_stats` of `transform`.

    Returns:
        None where pixels stay as they are.

    Raises:
        ArgumentError: `given` is not one of the forms that `transform` takes.
    """
    if given == "shared":
        return None
    pair = _known(model, proposal, channels) if given == "auto" else _checked(given, channels)
    if pair is None:
        return None
    (mean, std), (own_mean, own_std) = pair
    if tuple(mean) == tuple(own_mean) and tuple(std) == tuple(own_std):
        return None
    m, s, own_m, own_s = (torch.tensor(tuple(v), dtype=torch.float64) for v in (mean, std, own_mean, own_std))
    return s / own_s, (m - own_m) / own_s


def _known(model: nn.Module, proposal: nn.Module, channels: int) -> tuple[Statistics, Statistics] | None:
    """The statistics of both networks, if both have them for that many channels."""
    pair = statistics_of(model), statistics_of(proposal)
    if pair[0] is None or pair[1] is None or any(len(part) != channels for known in pair for part in known or ()):
        return None
    return pair[0], pair[1]


def _checked(given: object, channels: int) -> tuple[Statistics, Statistics]:
    """A user's statistics as numbers."""
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
