"""Counts the right answers of a model's variants on the data, and continues an interrupted run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from timm.data import RealLabelsImagenet
from torch import nn
from tqdm import tqdm

from ..errors import ArgumentError
from ..evaluation.counts import Progress
from ..evaluation.evaluate import DataError, Hooks, RunSettings, evaluate
from ..evaluation.results import part_of, read_part, remove_part, write_part
from ..evaluation.runner import Runner
from ..evaluation.samples import Samples
from ..evaluation.subject import Subject
from ..evaluation.variants import Variant
from .data import batch_size, samples_of
from .distributed import from_first, is_first
from .options import PRECISIONS


def counted(arguments: argparse.Namespace, subject: Subject, variants: Sequence[Variant]) -> Progress:
    """Evaluates the variants of a model, the dense one first; continues an interrupted run.

    Raises:
        DataError: No sample can be read, or with `--strict` one cannot.
    """
    data = samples_of(arguments, subject)
    identity = _identity(arguments, subject, len(data))
    progress = from_first(lambda: read_part(arguments.results_file, identity)) if arguments.results_file else None
    if progress and is_first():
        print(f"{part_of(arguments.results_file)}: continuing after {progress.done} of {len(data)} samples")
    modules = {variant.name: variant.module for variant in variants}
    twins = {variant.twin_name: variant.twin for variant in variants if variant.twin is not None}
    runners = {name: _runner(module, arguments, subject) for name, module in (modules | twins).items()}
    settings = RunSettings(
        variants[0].name,
        batch_size(arguments, subject),
        arguments.workers,
        subject.example.device,
        arguments.channels_last,
        _real_labels(arguments, data),
        arguments.strict,
        {variant.name: variant.twin_name for variant in variants if variant.twin is not None},
    )

    def save(found: Progress) -> None:
        if arguments.results_file and is_first():
            write_part(arguments.results_file, found, identity)

    unit = "video" if subject.views else "img"
    with tqdm(total=len(data), initial=progress.done if progress else 0, unit=unit, disable=not is_first()) as bar:
        found = evaluate(runners, data, settings, progress=progress, hooks=Hooks(save, bar.update))
    if not found.total:
        if arguments.results_file and is_first():
            remove_part(arguments.results_file)
        reasons = "; ".join(reason for _, reason in found.failed[:3])
        raise DataError(f"none of the {len(found.failed)} samples of {arguments.data} could be read: {reasons}")
    return found


def _runner(module: nn.Module, arguments: argparse.Namespace, subject: Subject) -> Runner:
    ready: Any = torch.compile(module) if arguments.torchcompile else module
    return Runner(ready, autocast=PRECISIONS[arguments.amp_dtype] if arguments.amp else None, views=subject.views)


def _identity(arguments: argparse.Namespace, subject: Subject, size: int) -> dict[str, Any]:
    """All that the counts depend on. They do not depend on the number of processes or the batch size."""
    apart = ("run", "results_file", "plot", "batch_size", "workers", "strict")
    given = {key: value for key, value in vars(arguments).items() if key not in apart}
    files = {name: _version(Path(value)) for name, value in given.items() if isinstance(value, str) and Path(value).is_file()}
    return {**given, **subject.config, "samples": size, "files": files}


def _version(file: Path) -> tuple[int, int]:
    """Size and modification time: they tell a file from a later one of the same name."""
    return file.stat().st_size, file.stat().st_mtime_ns


def _real_labels(arguments: argparse.Namespace, data: Samples) -> Callable[[int], Sequence[int]] | None:
    """ImageNet's reassessed labels of a sample, by its index."""
    if arguments.real_labels is None:
        return None
    names = [Path(data.name(index)).name for index in range(len(data))]
    try:
        known: Any = RealLabelsImagenet([""] * 50_000, arguments.real_labels or None)
        labels = {name: _checked_labels(known.real_labels[name]) for name in names}
    except (OSError, ValueError, AssertionError, KeyError, TypeError, RecursionError) as error:
        raise ArgumentError(f"--real-labels: they are for the 50000 files of ImageNet's validation: {error!r}") from error
    return lambda index: labels[names[index]]


def _checked_labels(found: object) -> Sequence[int]:
    """The labels of one sample, or `TypeError` if these are none."""
    labels = cast("list[object]", found) if isinstance(found, list) else [None]
    if not all(isinstance(label, int) for label in labels):
        raise TypeError(f"labels are lists of whole numbers, not {found!r}")
    return cast("list[int]", labels)
