"""Times the dense model, its pruned forms and peers of PaPr, in turns."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..passes.reduction import Reduction
from ..peers import REDUCERS, at_macs, kept_before, reduction_named, transcribed
from ..planning.module import PrunedModule, sibling
from ..review.report import report
from ..tracing.macs import count_module_macs
from ..transform import transform
from .bench_rows import Row
from .counts import count_parameters
from .timing import interleaved_times

METHODS = (*REDUCERS, "coarse", "transcription")


@dataclass(frozen=True)
class Candidate:
    """A module to time, its multiply-accumulates per image, and whether its images are channels-last."""

    module: nn.Module
    macs: int
    channels_last: bool = False


@dataclass(frozen=True)
class Comparison:
    """What is compared with the dense model.

    Attributes:
        ratios: Keep ratios in (0, 1).
        methods: Some of `METHODS`; each is given the multiply-accumulates of the pruned model at every keep ratio.
        options: Further options of `transform`.
    """

    ratios: Sequence[float]
    methods: Sequence[str] = ("papr",)
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class TimingSettings:
    """How candidates are timed.

    Attributes:
        batch_sizes: Images per batch.
        compiled: Whether each candidate is compiled with torch.compile.
        autocast: Lower precision to run in, if any.
        rounds: Timed calls of each candidate.
        warmup: Untimed calls of each before them.
    """

    batch_sizes: Sequence[int] = (1, 8, 32)
    compiled: bool = False
    autocast: torch.dtype | None = None
    rounds: int = 10
    warmup: int = 2


def candidates(model: nn.Module, proposal: nn.Module, images: Tensor, comparison: Comparison) -> dict[str, Candidate]:
    """Builds what is timed: the dense model in both memory layouts, and every method at every keep ratio.

    Args:
        model: The model, in eval mode.
        proposal: A ConvNet.
        images: A batch that the model takes, (B, C, H, W).
        comparison: What is compared with the dense model.

    Returns:
        The candidates by name.

    Raises:
        PaprError: The model is refused, or a method does not apply to it.
    """
    macs = count_module_macs(model, images)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    found = {"dense": Candidate(model, macs), "dense channels-last": Candidate(last, macs, channels_last=True)}

    def proved(**options: Any) -> PrunedModule:
        return transform(model, proposal, comparison.ratios[0], example_input=images, **comparison.options, **options)

    pruned = proved()
    peers = [name for name in comparison.methods if name not in ("papr", "coarse", "transcription")]
    reduced = {name: proved(merge=reduction_named(name)) for name in peers}
    coarse = proved(background="coarse") if "coarse" in comparison.methods else None
    for z in comparison.ratios:
        gm = sibling(pruned, z=z)
        for name in comparison.methods:
            if name == "coarse" and coarse is not None:
                other = sibling(coarse, z=z)
                found[f"coarse z={z:g}"] = Candidate(other, report(other).total_macs)
            else:
                found |= [_at(z, name, gm, reduced.get(name))]
    return found


def _at(z: float, method: str, gm: PrunedModule, reduced: PrunedModule | None) -> tuple[str, Candidate]:
    """One method at the multiply-accumulates that the pruned model has at z, and its name.

    `reduced` is the model with the tokens reduced by the method, unless that is PaPr itself or its transcription.
    """
    macs = report(gm).total_macs
    if reduced is None:
        return f"{method} z={z:g}", Candidate(gm if method == "papr" else transcribed(gm), macs)
    own = kept_before(z) if method.startswith("papr+") else 1.0
    fitted = at_macs(sibling(reduced, z=own), macs)
    (r,) = cast(Reduction, fitted.plan.reduction).numbers
    words = f"{method} z={own:g} r={r}" if own < 1 else f"{method} r={r}"
    return f"{words} (for z={z:g})", Candidate(fitted, report(fitted).total_macs)


def benchmark(
    model: str,
    chosen: Mapping[str, Candidate],
    images: Tensor,
    settings: TimingSettings,
    *,
    progress: Callable[[], object] = lambda: None,
) -> list[Row]:
    """Times candidates in turns, at each batch size.

    Args:
        model: Name of the model, for the rows.
        chosen: From `candidates`.
        images: Images (B, C, H, W); only their shape, dtype and device matter.
        settings: How they are timed.
        progress: Called after every call of a candidate.

    Returns:
        One row per batch size and candidate.
    """
    rows: list[Row] = []
    for size in settings.batch_sizes:
        batch = torch.randn((size, *images.shape[1:]), dtype=images.dtype, device=images.device)
        torch.compiler.reset()
        calls = {name: _call(candidate, batch, settings) for name, candidate in chosen.items()}
        times = interleaved_times(calls, rounds=settings.rounds, warmup=settings.warmup, progress=progress)
        medians = {name: statistics.median(values) for name, values in times.items()}
        dense = min(medians[name] for name in chosen if name.startswith("dense"))
        for name, candidate in chosen.items():
            low, high = _quartiles(times[name])
            row = Row(
                model=model,
                variant=name,
                run="compiled" if settings.compiled else "eager",
                infer_batch_size=size,
                infer_img_size=images.shape[-2],
                infer_samples_per_sec=1e3 * size / medians[name],
                infer_step_time=medians[name],
                infer_step_time_low=low,
                infer_step_time_high=high,
                infer_gmacs=candidate.macs / 1e9,
                param_count=count_parameters(candidate.module) / 1e6,
                speed_up=dense / medians[name],
                mac_ratio=chosen["dense"].macs / candidate.macs,
            )
            rows.append(row)
    return rows


def _call(candidate: Candidate, batch: Tensor, settings: TimingSettings) -> Callable[[], Any]:
    module: Any = torch.compile(candidate.module, fullgraph=True) if settings.compiled else candidate.module
    images = batch.contiguous(memory_format=torch.channels_last) if candidate.channels_last else batch
    autocast = settings.autocast

    def call() -> Any:
        with torch.autocast(batch.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            return module(images)

    return call


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[last // 4], ordered[ceil(last * 3 / 4)]
