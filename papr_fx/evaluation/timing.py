"""Paired timing: variants take turns, so that a noisy machine disturbs all of them alike, and medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import torch


def interleaved_times(
    variants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 7,
    warmup: int = 1,
    progress: Callable[[], object] = lambda: None,
    gradients: bool = False,
) -> dict[str, list[float]]:
    """Wall-clock times of variants that take turns.

    Args:
        variants: Functions to time, by name.
        rounds: Timed calls of each.
        warmup: Untimed calls of each before them.
        progress: Called after every call of a variant.
        gradients: Whether gradients are enabled, as in a training step.

    Returns:
        The time of each call in ms, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    with torch.inference_mode(not gradients):
        for _, (name, call) in product(range(warmup + rounds), variants.items()):
            start = _now()
            call()
            times[name].append((_now() - start) * 1e3)
            progress()
    return {name: values[warmup:] for name, values in times.items()}


def median_times(
    variants: Mapping[str, Callable[[], Any]], *, rounds: int = 7, warmup: int = 1, gradients: bool = False
) -> dict[str, float]:
    """Median time of each variant in ms; see `interleaved_times`."""
    times = interleaved_times(variants, rounds=rounds, warmup=warmup, gradients=gradients)
    return {name: statistics.median(values) for name, values in times.items()}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
