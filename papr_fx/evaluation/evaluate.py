"""Accuracy of a model, dense and at several keep ratios, in one pass over the data, on one process or many.

Every sample is read once and counted once, for any number of processes. The data is cut into chunks. Of each chunk, process r
of n takes every n-th sample, and the counts of all processes are added up after the chunk. A results file holds these sums, so
an interrupted run continues after the last whole chunk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import ArgumentError, PaprError
from .counts import Counts, Progress
from .runner import Runner
from .samples import Sample

_CHUNK = 32  # batches per process between two sums


class DataError(PaprError):
    """Data cannot be read, and the run was to be strict."""


@dataclass(frozen=True)
class RunSettings:
    """How variants of a model are evaluated.

    Attributes:
        dense: Name of the variant that agreement is counted against.
        batch_size: Samples per batch and process.
        workers: Processes that read data, per process.
        device: Where the variants are.
        channels_last: Memory layout of the images.
        real_labels: The labels of a sample by its index, where several may be right.
        strict: Whether a sample that cannot be read ends the run.
        twins: The variant with a random map, by the name of the variant that is compared with it, image by image.
    """

    dense: str
    batch_size: int = 64
    workers: int = 4
    device: torch.device | str = "cpu"
    channels_last: bool = False
    real_labels: Callable[[int], Sequence[int]] | None = None
    strict: bool = False
    twins: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Hooks:
    """What is called during an evaluation, on every process.

    Attributes:
        after_chunk: Called with the sums so far.
        after_batch: Called with the number of samples that all processes took in this batch.
    """

    after_chunk: Callable[[Progress], object] = lambda progress: None
    after_batch: Callable[[int], object] = lambda count: None


def evaluate(
    variants: Mapping[str, Runner],
    data: Dataset[Sample],
    settings: RunSettings,
    *,
    progress: Progress | None = None,
    hooks: Hooks | None = None,
) -> Progress:
    """Counts the right answers of several variants of a model, in one pass.

    Under torch.distributed every process calls it, and each returns the sum over all.

    Args:
        variants: The variants by name, ready to be called.
        data: Samples.
        settings: How they are run.
        progress: How far an earlier run came; it is continued, and changed.
        hooks: What is called on the way.

    Raises:
        DataError: `settings.strict`, and a sample cannot be read.
        ArgumentError: A sample is of a class that the model does not have.
    """
    hooks = hooks or Hooks()
    found = progress or Progress()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    size, step = len(cast(Any, data)), _CHUNK * settings.batch_size * world
    chunks = [range(start, min(start + step, size)) for start in range(found.done, size, step)]
    mine = [_batches(chunk[rank::world], settings.batch_size) for chunk in chunks]
    loader = DataLoader(
        data,
        batch_sampler=[batch for batches in mine for batch in batches],
        num_workers=settings.workers,
        pin_memory=torch.device(settings.device).type == "cuda",
    )
    batches: Iterator[Any] = iter(loader)
    _check_strict(settings, found)
    tally = _Tally(variants, settings)
    for chunk, own in zip(chunks, mine, strict=True):
        part = Progress()
        for start in range(0, world * settings.batch_size * len(own), world * settings.batch_size):
            tally.count(part, *next(batches))
            _check_strict(settings, part)
            hooks.after_batch(min(world * settings.batch_size, len(chunk) - start))
        for other in _gathered(part):
            found.add(other)
        found.done = chunk.stop
        hooks.after_chunk(found)
    return found


def _check_strict(settings: RunSettings, progress: Progress) -> None:
    if settings.strict and progress.failed:
        raise DataError(f"unreadable: {progress.failed[0][1]} (--strict)")


def _batches(indices: Sequence[int], size: int) -> list[list[int]]:
    return [[*indices[start : start + size]] for start in range(0, len(indices), size)]


def _gathered(part: Progress) -> list[Progress]:
    """What every process counted."""
    if not dist.is_initialized():
        return [part]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return parts


@dataclass
class _Tally:
    """Runs every variant on a batch, and counts.

    The first batch of each shape runs once more before it is timed, so that compilers and caches are warm.
    """

    variants: Mapping[str, Runner]
    settings: RunSettings
    warm: set[tuple[int, ...]] = field(default_factory=set[tuple[int, ...]])

    @torch.inference_mode()
    def count(self, part: Progress, pixels: Tensor, labels: Tensor, indices: Tensor, errors: Sequence[str]) -> None:
        """Adds the counts of a batch."""
        part.failed += [(int(index), error) for index, error in zip(indices, errors, strict=True) if error]
        readable = torch.tensor([not error for error in errors])
        pixels, labels, indices = pixels[readable], labels[readable], indices[readable]
        part.total += len(labels)
        if not len(labels):
            return
        pixels = pixels.to(self.settings.device, non_blocking=True)
        if self.settings.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        if pixels.shape not in self.warm:
            self.warm.add(tuple(pixels.shape))
            for runner in self.variants.values():
                runner(pixels)
        best = {name: self._add(part, name, pixels, labels, indices) for name in self.variants}
        for name, found in best.items():
            part.counts[name].agree += int((found == best[self.settings.dense]).sum())
        for name, twin in self.settings.twins.items():
            part.counts[name].compare(best[name], best[twin], labels, best[self.settings.dense])

    def _add(self, part: Progress, name: str, pixels: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Adds the counts of one variant; returns the class (B,) that it ranks first."""
        counts = part.counts.setdefault(name, Counts())
        start = _now(pixels)
        logits = self.variants[name](pixels)
        counts.seconds += _now(pixels) - start
        logits = logits.cpu()
        if int(labels.max()) >= logits.shape[1]:
            raise ArgumentError(f"the data has class {int(labels.max())}, but the model has {logits.shape[1]} classes")
        known = labels >= 0
        counts.labelled += int(known.sum())
        counts.top1 += _right(logits[known], labels[known], 1)
        counts.top5 += _right(logits[known], labels[known], min(5, logits.shape[1]))
        best = logits.argmax(1)
        if self.settings.real_labels:
            for index, label in zip(indices.tolist(), best.tolist(), strict=True):
                allowed = self.settings.real_labels(index)
                counts.real += label in allowed
                counts.real_total += len(allowed) > 0
        return best


def _right(logits: Tensor, labels: Tensor, k: int) -> int:
    """How many labels are among the k largest logits."""
    from torchmetrics.functional.classification import multiclass_stat_scores  # its import is slow

    if not len(labels):
        return 0
    scores = multiclass_stat_scores(logits, labels, num_classes=logits.shape[1], top_k=k, average="micro")
    return int(scores[0])


def _now(like: Tensor) -> float:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()
