"""The results of `papr-fx bench`: rows named as in timm's benchmark.py, as a table and as a file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import takewhile
from pathlib import Path

from tabulate import tabulate

from ..errors import ArgumentError


@dataclass(frozen=True)
class Row:
    """One variant of a model at one batch size.

    Attributes:
        model: Name of the model.
        variant: "dense", "dense channels-last", "papr z=...", "transcription z=...", "tome r=... (for z=...)" and so on.
        run: "eager" or "compiled".
        infer_batch_size: Images per batch.
        infer_img_size: Height of the images, in pixels.
        infer_samples_per_sec: Images per second, from the median time.
        infer_step_time: Median time of a batch, in ms.
        infer_step_time_low: Lower quartile of that time, in ms.
        infer_step_time_high: Upper quartile of that time, in ms.
        infer_gmacs: Multiply-accumulates per image, in 1e9, the proposal included.
        param_count: Parameters in millions, the proposal's included.
        speed_up: Time of the faster dense variant, divided by this variant's time.
        mac_ratio: Multiply-accumulates of the dense model, divided by this variant's.
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


def break_even(rows: Sequence[Row]) -> dict[tuple[str, str, str], int | None]:
    """The smallest batch from which on a variant is faster than the dense model; None if it is not faster at the largest batch.

    Returns:
        Batch sizes by model, variant and run; dense variants are left out.
    """
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: -row.infer_batch_size):
        if not row.variant.startswith("dense"):
            groups.setdefault((row.model, row.variant, row.run), []).append(row)
    faster = {key: list(takewhile(lambda row: row.speed_up > 1, group)) for key, group in groups.items()}
    return {key: batches[-1].infer_batch_size if batches else None for key, batches in faster.items()}


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
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
    """Checks that the file name has a suffix that `write` knows.

    Raises:
        ArgumentError: It is neither .csv nor .json.
    """
    if path.suffix not in (".csv", ".json"):
        raise ArgumentError(f"--results-file must end in .csv or .json, not {path}")


def write(rows: Sequence[Row], path: Path) -> None:
    """Writes rows as CSV or JSON, by the suffix of the file name.

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
