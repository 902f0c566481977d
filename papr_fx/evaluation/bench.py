"""`papr-fx bench`: dense model, pruned forms and peers, timed in turns; columns are named as in timm's benchmark.py."""

from __future__ import annotations

import copy
import csv
import io
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import takewhile
from math import ceil
from pathlib import Path
from typing import Any, cast

import torch
from tabulate import tabulate
from torch import Tensor, nn

from ..errors import ArgumentError
from ..peers import REDUCERS, at_macs, kept_before, reduction_named, transcribed
from ..planning.module import PrunedModule, sibling
from ..planning.plan import Tokens
from ..proposals.statistics import InputStats
from ..review.report import report
from ..tracing.macs import count_module_macs
from ..transform import transform
from .timing import interleaved_times

VARIANTS = (*REDUCERS, "transcription")


@dataclass(frozen=True)
class Row:
    """One variant of a model at one batch size.

    Attributes:
        model: Its name.
        variant: "dense", "dense channels-last", "papr z=...", "transcription z=...", "tome r=... at z=..." and so on.
        run: "eager" or "compiled".
        infer_batch_size: Images in a batch.
        infer_img_size: Height of the images, in pixels.
        infer_samples_per_sec: Images a second, from the median time.
        infer_step_time: Median time of a batch, in ms.
        infer_step_time_low: Lower quartile of it, in ms.
        infer_step_time_high: Upper quartile of it, in ms.
        infer_gmacs: Multiply-accumulates of one image, in 1e9, the proposal included.
        param_count: Millions of parameters, the proposal's included.
        speed_up: Time of the quicker dense form over that of this one.
        mac_ratio: Multiply-accumulates of the dense model over those of this one.
    """

    model: str
    variant: str
    run: str
    infer_batch_size: int
    infer_img_size: int
    infer_samples_per_sec: float
    infer_step_time: float
    infer_step_time_low: float
    infer_step_time_high: float
    infer_gmacs: float
    param_count: float
    speed_up: float
    mac_ratio: float


@dataclass(frozen=True)
class Variant:
    """Something to time: a module, its multiply-accumulates for one image, and whether images are channels-last."""

    module: nn.Module
    macs: int
    channels_last: bool = False


def variants(
    model: nn.Module,
    proposal: nn.Module,
    ratios: Sequence[float],
    *,
    images: Tensor,
    reducers: Sequence[str] = ("papr",),
    input_stats: InputStats = "auto",
    proposal_size: int | tuple[int, int] | None = None,
    mode: str = "auto",
) -> dict[str, Variant]:
    """What is timed of a model: the dense one in both memory layouts, pruned ones and their peers, by name.

    Args:
        model: The model, in eval mode.
        proposal: A ConvNet.
        ratios: Keep ratios in (0, 1).
        images: A batch such as the model takes, (B, C, H, W).
        reducers: Some of `VARIANTS`, each at the multiply-accumulates of every pruned form.
        input_stats: See `transform`.
        proposal_size: See `transform`.
        mode: See `transform`.

    Raises:
        PaprError: One cannot be had of this model.
    """
    macs = count_module_macs(model, images)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    found = {"dense": Variant(model, macs), "dense channels-last": Variant(last, macs, channels_last=True)}

    def proved(**options: Any) -> PrunedModule:
        return transform(
            model,
            proposal,
            ratios[0],
            example_input=images,
            mode=cast(Any, mode),
            input_stats=input_stats,
            proposal_size=proposal_size,
            **options,
        )

    pruned = proved()
    reduced = {name: proved(merge=reduction_named(name)) for name in reducers if name not in ("papr", "transcription")}
    for z in ratios:
        gm = sibling(pruned, z=z)
        total = report(gm).total_macs
        for name in reducers:
            if name == "papr":
                found[f"papr z={z:g}"] = Variant(gm, total)
            elif name == "transcription":
                found[f"transcription z={z:g}"] = Variant(transcribed(gm), total)
            else:
                own = kept_before(z) if name.startswith("papr+") else 1.0
                fewer = at_macs(sibling(reduced[name], z=own), total)
                r = cast(Any, cast(Tokens, fewer.plan.operator).reduction).r
                words = f"{name} z={own:g} r={r}" if own < 1 else f"{name} r={r}"
                found[f"{words} (for z={z:g})"] = Variant(fewer, report(fewer).total_macs)
    return found


def benchmark(
    name: str,
    chosen: Mapping[str, Variant],
    images: Tensor,
    *,
    batch_sizes: Sequence[int] = (1, 8, 32),
    compiled: bool = False,
    autocast: torch.dtype | None = None,
    rounds: int = 10,
    warmup: int = 2,
    progress: Callable[[], object] = lambda: None,
) -> list[Row]:
    """Times variants in turns at each batch size.

    Args:
        name: Name of the model, for the rows.
        chosen: From `variants`.
        images: Images (B, C, H, W), of which shape, dtype and device matter.
        batch_sizes: Images in a batch.
        compiled: Whether each variant is given to torch.compile.
        autocast: Lower precision to run in, if any.
        rounds: Timed calls of each variant.
        warmup: Calls of each beforehand.
        progress: Called behind every call of a variant.

    Returns:
        One row for each batch size and variant.
    """
    rows: list[Row] = []
    for size in batch_sizes:
        batch = torch.randn((size, *images.shape[1:]), dtype=images.dtype, device=images.device)
        torch.compiler.reset()
        calls = {key: _call(variant, batch, compiled=compiled, autocast=autocast) for key, variant in chosen.items()}
        times = interleaved_times(calls, rounds=rounds, warmup=warmup, progress=progress)
        medians = {key: statistics.median(values) for key, values in times.items()}
        dense = min(medians[key] for key in chosen if key.startswith("dense"))
        for key, variant in chosen.items():
            low, high = _quartiles(times[key])
            rows.append(
                Row(
                    name,
                    key,
                    "compiled" if compiled else "eager",
                    size,
                    images.shape[-2],
                    1e3 * size / medians[key],
                    medians[key],
                    low,
                    high,
                    variant.macs / 1e9,
                    sum(p.numel() for p in variant.module.parameters()) / 1e6,
                    dense / medians[key],
                    chosen["dense"].macs / variant.macs,
                )
            )
    return rows


def break_even(rows: Sequence[Row]) -> dict[tuple[str, str, str], int | None]:
    """For each model, variant and run, dense ones left out: the smallest batch from which on it is quicker than dense."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: -row.infer_batch_size):
        if not row.variant.startswith("dense"):
            groups.setdefault((row.model, row.variant, row.run), []).append(row)
    quicker = {key: list(takewhile(lambda row: row.speed_up > 1, group)) for key, group in groups.items()}
    return {key: some[-1].infer_batch_size if some else None for key, some in quicker.items()}


def table(rows: Sequence[Row]) -> str:
    """The rows for people."""
    cells = [
        (
            row.model,
            row.variant,
            row.run,
            row.infer_batch_size,
            f"{row.infer_gmacs:.2f}",
            f"{row.infer_step_time:.0f} ({row.infer_step_time_low:.0f}-{row.infer_step_time_high:.0f})",
            f"{row.infer_samples_per_sec:.1f}",
            f"{row.speed_up:.2f}",
            f"{row.mac_ratio:.2f}",
            f"{row.speed_up / row.mac_ratio:.2f}",
        )
        for row in rows
    ]
    headers = ["model", "variant", "run", "batch", "GMACs", "ms (quartiles)", "img/s", "speed-up", "MAC ratio", "of it"]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)


def check_suffix(path: Path) -> None:
    """Raises `ArgumentError` unless results can be written to a file of that name."""
    if path.suffix not in (".csv", ".json"):
        raise ArgumentError(f"--results-file must end in .csv or .json, not {path}")


def write(rows: Sequence[Row], path: Path) -> None:
    """Writes rows as JSON or, for a name that ends in .csv, as CSV.

    Raises:
        ArgumentError: The file cannot be written.
    """
    text = io.StringIO()
    if path.suffix == ".json":
        text.write(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    else:
        writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.getvalue())
    except OSError as error:
        raise ArgumentError(f"--results-file {path} cannot be written: {error}") from error


def _call(variant: Variant, batch: Tensor, *, compiled: bool, autocast: torch.dtype | None) -> Callable[[], Any]:
    module: Any = torch.compile(variant.module, fullgraph=True) if compiled else variant.module
    images = batch.contiguous(memory_format=torch.channels_last) if variant.channels_last else batch

    def call() -> Any:
        with torch.autocast(batch.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            return module(images)

    return call


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[last // 4], ordered[ceil(last * 3 / 4)]
