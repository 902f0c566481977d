"""Accuracy of a model, dense and at several keep ratios, in one pass over the data, on one process or many.

Every sample is read once and counted once, whatever the number of processes: of each chunk of the data, rank r of n takes every
n-th sample, and behind it the counts of all ranks are added up. What was counted by then is what a results file holds, so that
an interrupted run goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from timm.utils.decay_batch import check_batch_size_retry, decay_batch_step
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import ArgumentError, PaprError
from ..tracing.numerics import tensors_of
from .readers import Sample

_CHUNK = 32  # batches between two sums


class DataError(PaprError):
    """Data cannot be read, and the run was to be strict."""


@dataclass
class Counts:
    """What was counted of one variant; counts of several runs add up.

    Attributes:
        labelled: Samples that have a class.
        top1: Those of them whose class comes first.
        top5: Those whose class is among the first five.
        agree: Samples of which the first class is that of the dense model.
        real: Samples whose first class is among ImageNet's reassessed labels.
        real_total: Samples that have such labels.
        seconds: Time that the variant took, the data left out.
    """

    labelled: int = 0
    top1: int = 0
    top5: int = 0
    agree: int = 0
    real: int = 0
    real_total: int = 0
    seconds: float = 0.0

    def add(self, other: Counts) -> None:
        """Adds another's counts."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        done: Samples of the data that were taken, from the first on.
        total: Those that could be read.
        counts: For each variant, by name.
        failed: Of those that could not be read: place in the data, and why.
    """

    done: int = 0
    total: int = 0
    counts: dict[str, Counts] = field(default_factory=dict[str, Counts])
    failed: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])

    def add(self, other: Progress) -> None:
        """Adds what another process counted of the same chunk; `done` is not touched."""
        self.total += other.total
        for name, counts in other.counts.items():
            self.counts.setdefault(name, Counts()).add(counts)
        self.failed = sorted({*self.failed, *other.failed})


class Runner:
    """Calls a model, in halves of a batch where the memory is too small for all of it.

    Args:
        module: The model, possibly compiled.
        autocast: Lower precision to run in, if any.
        views: Whether a sample is several views, whose probabilities are averaged.
    """

    def __init__(self, module: Callable[[Tensor], Any], *, autocast: torch.dtype | None = None, views: bool = False) -> None:
        self.module = module
        self.autocast = autocast
        self.views = views
        self.largest = 0  # inputs in a batch that fit; 0 as long as none failed

    def __call__(self, inputs: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, ...), or of views (B, V, ...) probabilities."""
        if not self.views:
            return self._in_parts(inputs)
        scores = self._in_parts(inputs.flatten(0, 1)).softmax(-1)  # (B * V, classes)
        return scores.unflatten(0, inputs.shape[:2]).mean(1)

    def _in_parts(self, inputs: Tensor) -> Tensor:
        while True:
            try:
                parts = inputs.split(self.largest or len(inputs))
                return torch.cat([self._logits(part) for part in parts])
            except RuntimeError as error:
                smaller = decay_batch_step(self.largest or len(inputs), num_intra_steps=1)
                if not _is_out_of_memory(error) or not smaller:
                    raise
                self.largest = smaller
            if inputs.is_cuda:
                torch.cuda.empty_cache()

    def _logits(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            return tensors_of(self.module(images))[0].float()


def _is_out_of_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    told = "out of memory" in text or "alloc_failed" in text or ("alloc" in text and "memory" in text)
    return isinstance(error, torch.OutOfMemoryError) or (told and check_batch_size_retry(text))


def evaluate(
    variants: Mapping[str, Runner],
    data: Dataset[Sample],
    *,
    dense: str,
    batch_size: int = 64,
    workers: int = 4,
    device: torch.device | str = "cpu",
    channels_last: bool = False,
    progress: Progress | None = None,
    behind_chunk: Callable[[Progress], object] = lambda progress: None,
    behind_batch: Callable[[int], object] = lambda count: None,
    real_labels: Callable[[int], Sequence[int]] | None = None,
    strict: bool = False,
) -> Progress:
    """Counts what several variants of a model find, in one pass.

    Under torch.distributed all processes call it; each returns the sum of all. A chunk is 32 batches of every process.

    Args:
        variants: Ready to be called, by name.
        data: Samples.
        dense: Name of the variant with which the others are to agree.
        batch_size: Samples in a batch of one process.
        workers: Processes that read data, of each process.
        device: Where the variants are.
        channels_last: Memory layout of the images.
        progress: How far an earlier run came; it is continued.
        behind_chunk: Called on every process with the sum so far.
        behind_batch: Called with the samples that this batch took, on all processes together.
        real_labels: Labels of a sample by its place, where several may be right.
        strict: Whether a sample that cannot be read ends the run.

    Raises:
        DataError: `strict`, and a sample cannot be read.
        ArgumentError: A sample is of a class that the model does not know.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    found = progress or Progress()
    size = len(cast(Any, data))
    step = _CHUNK * batch_size * world
    chunks = [range(start, min(start + step, size)) for start in range(found.done, size, step)]
    mine = [_batches(places[rank::world], batch_size) for places in chunks]
    loader = DataLoader(
        data,
        batch_sampler=[batch for batches in mine for batch in batches],
        num_workers=workers,
        pin_memory=torch.device(device).type == "cuda",
    )
    batches: Iterator[Any] = iter(loader)
    if strict and found.failed:
        raise DataError(f"unreadable: {found.failed[0][1]} (--strict)")
    tally = _Tally(variants, dense, torch.device(device), channels_last, real_labels)
    for places, own in zip(chunks, mine, strict=True):
        part = Progress()
        for start in range(0, world * batch_size * len(own), world * batch_size):
            tally.count(part, *next(batches))
            if strict and part.failed:
                raise DataError(f"unreadable: {part.failed[0][1]} (--strict)")
            behind_batch(min(world * batch_size, len(places) - start))
        for other in _gathered(part):
            found.add(other)
        found.done = places.stop
        behind_chunk(found)
    return found


def _batches(places: Sequence[int], size: int) -> list[list[int]]:
    return [[*places[start : start + size]] for start in range(0, len(places), size)]


def _gathered(part: Progress) -> list[Progress]:
    """What every process counted."""
    if not dist.is_initialized():
        return [part]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return parts


@dataclass
class _Tally:
    """Runs every variant on a batch and counts.

    The first batch of each shape is run once more before it is timed: compilers and caches are warm then.
    """

    variants: Mapping[str, Runner]
    dense: str
    device: torch.device
    channels_last: bool
    real_labels: Callable[[int], Sequence[int]] | None
    warm: set[tuple[int, ...]] = field(default_factory=set[tuple[int, ...]])

    @torch.inference_mode()
    def count(self, part: Progress, pixels: Tensor, labels: Tensor, places: Tensor, errors: Sequence[str]) -> None:
        """Adds the counts of a batch."""
        part.failed += [(int(place), error) for place, error in zip(places, errors, strict=True) if error]
        readable = torch.tensor([not error for error in errors])
        pixels, labels, places = pixels[readable], labels[readable], places[readable]
        part.total += len(labels)
        if not len(labels):
            return
        pixels = pixels.to(self.device, non_blocking=True)
        if self.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        if pixels.shape not in self.warm:
            self.warm.add(tuple(pixels.shape))
            for runner in self.variants.values():
                runner(pixels)
        first = self._add(part, self.dense, pixels, labels, places)
        for name in self.variants:
            if name != self.dense:
                best = self._add(part, name, pixels, labels, places)
                part.counts[name].agree += int((best == first).sum())
        part.counts[self.dense].agree += len(first)

    def _add(self, part: Progress, name: str, pixels: Tensor, labels: Tensor, places: Tensor) -> Tensor:
        """Adds what one variant finds; returns the class of each sample that it puts first."""
        counts = part.counts.setdefault(name, Counts())
        start = _now(pixels)
        logits = self.variants[name](pixels)
        counts.seconds += _now(pixels) - start
        logits = logits.cpu()
        if int(labels.max()) >= logits.shape[1]:
            raise ArgumentError(f"the data has class {int(labels.max())}, but the model tells {logits.shape[1]} apart")
        known = labels >= 0
        counts.labelled += int(known.sum())
        counts.top1 += _right(logits[known], labels[known], 1)
        counts.top5 += _right(logits[known], labels[known], min(5, logits.shape[1]))
        best = logits.argmax(1)
        if self.real_labels:
            for place, label in zip(places.tolist(), best.tolist(), strict=True):
                allowed = self.real_labels(place)
                counts.real += label in allowed
                counts.real_total += len(allowed) > 0
        return best


def _right(logits: Tensor, labels: Tensor, k: int) -> int:
    """How many labels are among the k largest logits."""
    from torchmetrics.functional.classification import multiclass_stat_scores  # it takes its time

    if not len(labels):
        return 0
    scores = multiclass_stat_scores(logits, labels, num_classes=logits.shape[1], top_k=k, average="micro")
    return int(scores[0])


def _now(like: Tensor) -> float:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()
