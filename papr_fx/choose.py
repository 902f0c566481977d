"""Finds the keep ratio for a target: an accuracy drop, a speed-up, or a number of multiply-accumulates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import ArgumentError
from .evaluation.chance import Versus, remedy, with_random_map
from .evaluation.timing import median_times
from .planning.module import PrunedModule, sibling
from .review.report import report
from .tracing.fakes import flags_of, set_flags
from .tracing.macs import count_module_macs
from .tracing.numerics import tensors_of
from .transform import transform

_LOWEST = 0.05  # below this, hardly a patch is left
_STEPS = 7  # bisections: they narrow the interval of keep ratios to 0.0075


class Point(NamedTuple):
    """What was measured at one keep ratio.

    Attributes:
        z: The keep ratio.
        value: The drop in accuracy (or in agreement with the dense model), the speed-up, or the GMACs.
    """

    z: float
    value: float


class RandomPoint(NamedTuple):
    """What a random map gave at one keep ratio.

    Attributes:
        z: The keep ratio.
        value: The drop in accuracy (or in agreement with the dense model) with a random map.
        versus: The chosen map against the random one, image by image.
    """

    z: float
    value: float
    versus: Versus


class KeepRatio(float):
    """A keep ratio, with the points that were measured to find it.

    Attributes:
        curve: One point per keep ratio that was tried, in ascending order.
        random: The same for a random map; empty unless it was measured.
        dense: Accuracy of the dense model, from 0 to 1; None unless it was measured.
    """

    curve: tuple[Point, ...]
    random: tuple[RandomPoint, ...]
    dense: float | None

    def __new__(
        cls, z: float, curve: Iterable[Point], random: Iterable[RandomPoint] = (), dense: float | None = None
    ) -> KeepRatio:
        """Makes a keep ratio from a number and its points."""
        ratio = super().__new__(cls, z)
        ratio.dense = dense
        ratio.curve = tuple(sorted(curve))
        ratio.random = tuple(sorted(random, key=lambda point: point.z))
        return ratio

    def __reduce__(self) -> tuple[Any, ...]:
        return KeepRatio, (float(self), self.curve, self.random, self.dense)


def choose_keep_ratio(
    model: nn.Module,
    proposal: nn.Module | str | None,
    loader: Iterable[Any],
    *,
    max_drop: float | None = None,
    speedup: float | None = None,
    gmacs: float | None = None,
    random: bool = False,
    **options: Any,
) -> KeepRatio:
    """Finds a keep ratio for exactly one target, by bisection over few ratios.

    Args:
        model: As for `transform`.
        proposal: As for `transform`.
        loader: Batches of images (B, C, H, W), or of (images, labels (B,)). For `max_drop`, all of it is read for the dense
            model and again for every ratio that is tried. For `speedup`, the first batch is timed. For `gmacs`, it is not read.
        max_drop: Finds the smallest ratio at which accuracy drops by at most this much, from 0 to 1. Without labels, agreement
            with the dense model stays at or above 1 - max_drop.
        speedup: Finds the largest ratio at which a batch runs this many times as fast as the dense model, both eager.
        gmacs: Finds the largest ratio at which an image takes at most this many multiply-accumulates, in 1e9, the proposal
            included.
        random: Whether to measure a random map beside the chosen one, at every ratio that is tried for `max_drop`: it tells
            whether the map helps on these images. Then each of them goes through one pruned model more.
        **options: Further options of `transform`.

    Returns:
        The ratio, a float with the measured points as its `curve`, and those of a random map as `random`. It is 1.0 if the
        dense model already meets `speedup` or `gmacs`, or if no smaller ratio meets `max_drop`.

    Raises:
        ArgumentError: There is not exactly one target, or it cannot be reached.
        PaprError: The model is refused.
    """
    targets = {"max_drop": max_drop, "speedup": speedup, "gmacs": gmacs}
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise ArgumentError(f"choose_keep_ratio needs one target of {', '.join(targets)}, not {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    if not 0 <= value < float("inf") or (name == "max_drop" and value > 1):
        raise ArgumentError(
            f"{name} must be a number {'from 0 to 1' if name == 'max_drop' else 'of at least 0'}, not {value!r}"
        )
    flags = flags_of(model)
    model.eval()
    try:
        proved = transform(model, proposal, 0.5, **options)
        if name == "max_drop":
            return _by_drop(model, proved, loader, value, random=random and options.get("saliency") != "random")
        return _by_macs(model, proved, value) if name == "gmacs" else _by_speed(model, proved, loader, value)
    finally:
        set_flags(model, flags)


def _by_drop(
    model: nn.Module, proved: PrunedModule, loader: Iterable[Any], allowed: float, *, random: bool = False
) -> KeepRatio:
    """The smallest ratio whose drop in accuracy is allowed."""
    dense: list[Tensor] = []
    right = total = 0
    labelled = True
    for images, labels in _batches(loader, proved):
        answers = _answers(model, images)
        dense.append(answers)
        labelled = labelled and labels is not None
        right += int((answers == (answers if labels is None else labels)).sum())
        total += len(answers)
    if not total:
        raise ArgumentError("choose_keep_ratio: the loader holds no images, or none with a class (tune: --no-labels)")
    by_chance: list[RandomPoint] = []

    def drop(z: float) -> float:
        pruned = sibling(proved, z=z)
        twin = with_random_map(proved, z) if random else None
        still_right = wins = losses = 0
        for (images, labels), answers in zip(_batches(loader, proved), dense, strict=True):
            truth = answers if labels is None else labels
            found = _answers(pruned, images) == truth
            still_right += int(found.sum())
            if twin is not None:
                other = _answers(twin, images) == truth
                wins, losses = wins + int((found & ~other).sum()), losses + int((other & ~found).sum())
        if twin is not None:
            versus = Versus(total, wins, losses, remedy(proved))
            by_chance.append(RandomPoint(z, (right - still_right + wins - losses) / total, versus))
        return (right - still_right) / total

    found = _bisected(drop, lambda value: value <= allowed, least=True)
    return KeepRatio(found, found.curve, by_chance, right / total if labelled else None)


def _by_macs(model: nn.Module, proved: PrunedModule, most: float) -> KeepRatio:
    """The largest ratio with at most `most` GMACs."""
    dense = count_module_macs(model, proved.example()) / 1e9
    if dense <= most:
        return KeepRatio(1.0, [Point(1.0, dense)])
    found = _bisected(lambda z: report(sibling(proved, z=z)).total_macs / 1e9, lambda macs: macs <= most, least=False)
    return _reached(found, f"{most:g} GMACs", "at z={0.z:g} there are {0.value:.2f}")


def _by_speed(model: nn.Module, proved: PrunedModule, loader: Iterable[Any], least: float) -> KeepRatio:
    """The largest ratio with a speed-up of at least `least`."""
    images, _ = next(iter(_batches(loader, proved)), (None, None))
    if images is None:
        raise ArgumentError("choose_keep_ratio: the loader holds no images")

    def speed(z: float) -> float:
        pruned = sibling(proved, z=z)
        times = median_times({"dense": lambda: model(images), "pruned": lambda: pruned(images)}, rounds=5)
        return times["dense"] / times["pruned"]

    if least <= 1:
        return KeepRatio(1.0, [])  # the dense model; nothing is measured
    found = _bisected(speed, lambda times: times >= least, least=False)
    return _reached(found, f"a speed-up of {least:g}", "at z={0.z:g} it is {0.value:.2f}")


def _bisected(measure: Callable[[float], float], fits: Callable[[float], bool], *, least: bool) -> KeepRatio:
    """The smallest ratio that fits, or with `least=False` the largest; NaN if none does.

    `fits` must be monotonic: with `least`, every ratio above one that fits also fits; without, every ratio below.
    """
    curve: list[Point] = []

    def tried(z: float) -> bool:
        curve.append(Point(z, measure(z)))
        return fits(curve[-1].value)

    good, bad = (1.0, _LOWEST) if least else (_LOWEST, 1.0)
    if tried(_LOWEST) == least:  # with `least` all fit, else none does
        return KeepRatio(_LOWEST if least else float("nan"), curve)
    for _ in range(_STEPS):
        middle = round((good + bad) / 2, 4)
        good, bad = (middle, bad) if tried(middle) else (good, middle)
    return KeepRatio(good, curve)


def _reached(found: KeepRatio, target: str, least: str) -> KeepRatio:
    """Refuses a target that no ratio reaches; `least` says what the smallest ratio gives."""
    if found != found:  # NaN
        raise ArgumentError(f"choose_keep_ratio: {target} cannot be reached: {least.format(found.curve[0])}")
    return found


def _batches(loader: Iterable[Any], proved: PrunedModule) -> Iterable[tuple[Tensor, Tensor | None]]:
    """Images and labels, on the model's device."""
    device = proved.example().device
    for batch in loader:
        images, labels = (batch[0], batch[1]) if isinstance(batch, tuple | list) else (batch, None)
        yield images.to(device), None if labels is None else labels.to(device)


@torch.inference_mode()
def _answers(model: nn.Module, images: Tensor) -> Tensor:
    return tensors_of(model(images))[0].argmax(1)
