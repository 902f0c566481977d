"""What is timed: a model dense and pruned, token merging at equal MACs, and PaPr written plainly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import papr_fx
from papr_fx.peers import at_macs, transcribed
from papr_fx.tracing.numerics import tensors_of

from .device import Device
from .jobs import TRAINING, Job
from .subjects import SUBJECTS, Sight, images_for

DENSE, CHANNELS_LAST, MERGING, PLAIN = "dense", "dense channels-last", "merging", "transcription"
MAIN, SMALLER, CHEAPEST = "mobileone_s0 224", "mobileone_s0 160", "lcnet_035 160"
_SIGHTS = {MAIN: Sight(), SMALLER: Sight(pixels=160), CHEAPEST: Sight("lcnet_035", 160)}


@dataclass(frozen=True)
class Variant:
    """A variant that is ready to be timed.

    Attributes:
        call: One batch, or one step of training.
        macs: Multiply-accumulates of it per image; 0 if nobody counted them.
        dense_macs: The same of the dense model.
    """

    call: Callable[[], Any]
    macs: int = 0
    dense_macs: int = 0


def build(job: Job, device: Device) -> Variant:
    """The variant of a job, not yet compiled: that happens at the first call."""
    subject = SUBJECTS[job.subject]
    model = subject.build(tiny=job.tiny).to(device.kind, torch.bfloat16)
    images = images_for(model, job.batch, tiny=job.tiny)
    training = job.part == TRAINING
    module, counts = _module(job, model.train(training), images)
    if training:
        macs, dense = (3 * counts.pruned_macs + counts.proposal_macs, 3 * counts.dense_macs) if counts else (0, 0)
        return Variant(_step(module, images, job, device), macs, dense)
    if job.what == CHANNELS_LAST:
        images = images.contiguous(memory_format=torch.channels_last)
    compiled = device.compiled(module, job.mode)

    def call() -> Any:
        if job.mode == "graphs":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return compiled(images)

    return Variant(call, *((counts.total_macs, counts.dense_macs) if counts else (0, 0)))


def _module(job: Job, model: nn.Module, images: Tensor) -> tuple[nn.Module, papr_fx.Report | None]:
    """The module of a variant, and its counts unless it is dense."""
    if job.what == DENSE:
        return model, None
    if job.what == CHANNELS_LAST:
        return model.to(memory_format=torch.channels_last), None  # pyright: ignore[reportCallIssue]
    sight, z = _SIGHTS.get(job.what, _SIGHTS[MAIN]), SUBJECTS[job.subject].z
    if job.tiny:
        sight = sight.tiny()
    gm = sight.prune(model, images, z)
    if job.what == PLAIN:
        return transcribed(gm), papr_fx.report(gm)
    if job.what == MERGING:
        merging = sight.prune(model, images, 1.0, merge=papr_fx.Merge(1, "all"))
        gm = at_macs(merging, papr_fx.report(gm).total_macs)
    return gm, papr_fx.report(gm)


def _step(module: nn.Module, images: Tensor, job: Job, device: Device) -> Callable[[], None]:
    """Forward, backward, and an update by SGD."""
    compiled = device.compiled(module, job.mode)
    optimiser = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1e-4)
    labels = torch.zeros(job.batch, dtype=torch.int64, device=images.device)

    def step() -> None:
        optimiser.zero_grad()
        F.cross_entropy(tensors_of(compiled(images))[0].float(), labels).backward()
        optimiser.step()

    return step
