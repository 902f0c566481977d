"""Finding the keep ratio for a target: so much accuracy to lose, so much speed or so few MACs to reach."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import ArgumentError
from .evaluation.timing import median_times
from .planning.module import PrunedModule, sibling
from .review.report import report
from .tracing.macs import count_module_macs
from .tracing.numerics import tensors_of
from .transform import transform

_LOWEST = 0.05  # below, hardly a patch is left
_STEPS = 7  # halvings of the interval of keep ratios: to 0.0075


class Point(NamedTuple):
    """What was seen at one keep ratio.

    Attributes:
        z: The keep ratio.
        value: Of the target: the drop in accuracy (or in agreement with the dense model), the speed-up, or GMACs.
    """

    z: float
    value: float


class KeepRatio(float):
    """A keep ratio, and the curve that was seen on the way to it.

    Attributes:
        curve: One point for each keep ratio that was tried, from the least on.
    """

    curve: tuple[Point, ...]

    def __new__(cls, z: float, curve: Iterable[Point]) -> KeepRatio:
        """A number with a curve."""
        ratio = super().__new__(cls, z)
        ratio.curve = tuple(sorted(curve))
        return ratio


def choose_keep_ratio(
    model: nn.Module,
    proposal: nn.Module | str,
    loader: Iterable[Any],
    *,
    max_drop: float | None = None,
    speedup: float | None = None,
    gmacs: float | None = None,
    **options: Any,
) -> KeepRatio:
    """Finds a keep ratio for exactly one target, by bisection: few ratios are tried.

    Args:
        model: As for `transform`.
        proposal: As for `transform`.
        loader: Batches of images (B, C, H, W), or of (images, labels (B,)). It is gone through once for each ratio that is
            tried against `max_drop`; of the other targets, its first batch says what batch size to time.
        max_drop: The least ratio at which the share of right answers falls by no more, from 0 to 1; without labels, the
            share of answers that are the dense model's falls by no more from 1.
        speedup: The largest ratio at which a batch takes the dense model's time over this, both eager, in turns.
        gmacs: The largest ratio at which an image takes no more multiply-accumulates, in 1e9, the proposal included.
        **options: Further options of `transform`.

    Returns:
        The ratio, a float with a `curve` of the points that were seen; 1.0 where the dense model itself is as wanted, and
        nothing below is.

    Raises:
        ArgumentError: No target is given, or several, or one that cannot be reached.
        PaprError: The model is refused.
    """
    targets = {"max_drop": max_drop, "speedup": speedup, "gmacs": gmacs}
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise ArgumentError(f"choose_keep_ratio needs one target of {', '.join(targets)}, not {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    if not 0 <= value < float("inf") or (name == "max_drop" and value > 1):
        raise ArgumentError(f"{name} must be a number from 0 on{', at most 1' if name == 'max_drop' else ''}, not {value!r}")
    training = model.training
    model.eval()
    try:
        proved = transform(model, proposal, 0.5, **options)
        if name == "max_drop":
            return _by_drop(model, proved, loader, value)
        return _by_macs(model, proved, value) if name == "gmacs" else _by_speed(model, proved, loader, value)
    finally:
        model.train(training)


def _by_drop(model: nn.Module, proved: PrunedModule, loader: Iterable[Any], allowed: float) -> KeepRatio:
    first: list[Tensor] = []
    right: list[int] = []
    total = 0
    for images, labels in _batches(loader, proved):
        answers = _answers(model, images)
        first.append(answers)
        right.append(int((answers == (answers if labels is None else labels)).sum()))
        total += len(answers)
    if not total:
        raise ArgumentError("choose_keep_ratio: the loader holds no images, or none with a class (tune: --no-labels)")

    def drop(z: float) -> float:
        pruned, kept = sibling(proved, z=z), 0
        for (images, labels), dense in zip(_batches(loader, proved), first, strict=True):
            kept += int((_answers(pruned, images) == (dense if labels is None else labels)).sum())
        return (sum(right) - kept) / total

    return _bisected(drop, lambda found: found <= allowed, least=True)


def _by_macs(model: nn.Module, proved: PrunedModule, most: float) -> KeepRatio:
    if count_module_macs(model, proved.example()) / 1e9 <= most:
        return KeepRatio(1.0, [Point(1.0, count_module_macs(model, proved.example()) / 1e9)])
    found = _bisected(lambda z: report(sibling(proved, z=z)).total_macs / 1e9, lambda macs: macs <= most, least=False)
    return _reached(found, f"{most:g} GMACs", "at z={0.z:g} there are {0.value:.2f}")


def _by_speed(model: nn.Module, proved: PrunedModule, loader: Iterable[Any], least: float) -> KeepRatio:
    images, _ = next(iter(_batches(loader, proved)), (None, None))
    if images is None:
        raise ArgumentError("choose_keep_ratio: the loader holds no images")

    def speed(z: float) -> float:
        pruned = sibling(proved, z=z)
        times = median_times({"dense": lambda: model(images), "pruned": lambda: pruned(images)}, rounds=5)
        return times["dense"] / times["pruned"]

    if least <= 1:
        return KeepRatio(1.0, [Point(1.0, 1.0)])
    found = _bisected(speed, lambda times: times >= least, least=False)
    return _reached(found, f"a speed-up of {least:g}", "at z={0.z:g} it is {0.value:.2f}")


def _bisected(measure: Callable[[float], float], fits: Callable[[float], bool], *, least: bool) -> KeepRatio:
    """The least ratio that fits, of those above it all do; or the largest, of those below it all do. NaN if none does."""
    curve: list[Point] = []

    def tried(z: float) -> bool:
        curve.append(Point(z, measure(z)))
        return fits(curve[-1].value)

    good, bad = (1.0, _LOWEST) if least else (_LOWEST, 1.0)
    if tried(_LOWEST) == least:  # all fit, or none does
        return KeepRatio(_LOWEST if least else float("nan"), curve)
    for _ in range(_STEPS):
        middle = round((good + bad) / 2, 4)
        good, bad = (middle, bad) if tried(middle) else (good, middle)
    return KeepRatio(good, curve)


def _reached(found: KeepRatio, target: str, least: str) -> KeepRatio:
    if found != found:
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
