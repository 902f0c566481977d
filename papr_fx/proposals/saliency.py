"""Sources of the significance map: how the proposal's feature maps become one map.

The paper's map is their mean: the class weights of the proposal are replaced by uniform ones (PaPr, Sec. 3.1). Class
activation maps, in `cams`, weigh them by the proposal's own classifier; they are the paper's baselines (PaPr, Tab. 7). All
sources take batches, and use neither hooks nor a backward pass through the trunk, so they run inside a compiled graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ProposalError
from ..ops import wide
from .cams import ClassActivation, GradCAM, ScoreCAM, class_weights
from .chance import scattered, seeds
from .split import Halves

Named = Literal["psm", "expected-cam", "cam", "gradcam", "scorecam", "random"]
Moving = Literal[
    "motion", "motion*psm", "motion*expected-cam", "motion*cam", "motion*gradcam", "motion*scorecam", "motion*random"
]
Saliency = Named | Moving | Callable[[Tensor], Tensor]
NAMES: tuple[Named, ...] = get_args(Named)
CLIP_NAMES: tuple[Moving, ...] = get_args(Moving)  # for clips only


def checked_saliency(saliency: object) -> Saliency:
    """Returns a name among `NAMES` or `CLIP_NAMES`, or a function of features; else raises `ArgumentError`."""
    if saliency in (*NAMES, *CLIP_NAMES) or (callable(saliency) and not isinstance(saliency, type)):
        return cast(Saliency, saliency)
    words = ", ".join(f'"{name}"' for name in NAMES)
    raise ArgumentError(
        f'saliency must be one of {words}; for clips also "motion", or "motion*" and one of these; or a function of features '
        f"(B, K, h, w), not {saliency!r}"
    )


def needs_proposal(saliency: Saliency) -> bool:
    """Whether a source of the map needs a proposal."""
    return parts_of(saliency)[1] is not None


def parts_of(saliency: Saliency) -> tuple[bool, Saliency | None]:
    """Whether the map is made of motion, and the source that a network's features are needed for, if any."""
    if isinstance(saliency, str) and saliency in CLIP_NAMES:
        return True, cast("Named | None", saliency.partition("*")[2] or None)
    return False, cast(Saliency, saliency)


def build_map(saliency: Saliency, halves: Halves, sample: Tensor, name: str) -> nn.Module:
    """Builds the module that maps (features, images, trunk) to maps (B, h, w), or (B, t, h, w), float32 or wider.

    Args:
        saliency: A name of `NAMES`, or a function of features with channels in axis 1.
        halves: The proposal.
        sample: One image as the trunk takes it.
        name: Class name of the proposal, for messages.

    Raises:
        ProposalError: The source needs a classifier that the proposal does not have, or a function returns no maps.
    """
    axis = halves.channel_axis
    if saliency == "random":
        return Chance(axis)
    if axis is None:
        if saliency != "psm":
            raise ProposalError(f"saliency: the proposal ({name}) returns one map, so there are no features to weigh")
        return _Identity()
    if saliency == "psm":
        return Mean(axis)
    if not isinstance(saliency, str):
        own = copy.deepcopy(saliency) if isinstance(saliency, nn.Module) else saliency
        with torch.no_grad():
            return _tried(_Function(own, axis), halves.trunk(sample), sample, halves.trunk)
    classifier = halves.classifier
    if classifier is None:
        raise ProposalError(
            f"saliency={saliency!r} needs the proposal's classifier, but ({name}) returns features: pass a classifier"
        )
    if saliency == "gradcam":
        return GradCAM(classifier, axis)
    if saliency == "scorecam":
        return ScoreCAM(classifier, axis)
    with torch.no_grad():
        weights = class_weights(halves.trunk(sample), classifier, axis, name)
    return ClassActivation(classifier, weights, axis, expected=saliency == "expected-cam")


def _tried(function: nn.Module, *arguments: Any) -> nn.Module:
    """Calls a user's function once, so that it is refused here if it makes no maps; returns it."""
    function(*arguments)
    return function


class _Identity(nn.Module):
    """The proposal's own maps."""

    def forward(self, features: Tensor, images: Tensor, trunk: nn.Module) -> Tensor:
        return features.to(wide(features))


class Mean(nn.Module):
    """The mean over channels (PaPr, Eq. 2)."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, features: Tensor, images: Tensor, trunk: nn.Module) -> Tensor:
        return features.mean(self.axis, dtype=wide(features))


class Chance(nn.Module):
    """Scores that do not depend on what a position shows, the same at each call for the same image."""

    def __init__(self, axis: int | None) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, features: Tensor, images: Tensor, trunk: nn.Module) -> Tensor:
        coarse = features.shape[1:] if self.axis is None else features.movedim(self.axis, 1).shape[2:]
        grid = [8 * size for size in coarse]  # finer than the tokens' grid: neighbours stay unrelated after resizing
        return scattered(seeds(images), grid)


class _Function(nn.Module):
    """A user's function of features (B, K, *grid), or a module."""

    def __init__(self, function: Callable[[Tensor], Tensor], axis: int) -> None:
        super().__init__()
        self.function = function
        self.axis = axis

    def forward(self, features: Tensor, images: Tensor, trunk: nn.Module) -> Tensor:
        features = features.movedim(self.axis, 1)
        maps = self.function(features)
        if maps.shape != (features.shape[0], *features.shape[2:]):
            found = tuple(maps.shape)
            raise ProposalError(f"saliency must map features {tuple(features.shape)} to maps (B, *grid), not {found}")
        return maps.to(wide(maps))
