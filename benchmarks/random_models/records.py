"""The record of a run: one line of JSON for each model, so that a run goes on where it stopped; and the table of it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .draw import draw
from .judge import Result, excuses
from .spec import Spec

# The trunks as a page names them.
TRUNKS = {
    "vit": "plain ViTs",
    "clip": "ViTs of clips",
    "conv": "convolutional",
    "windows": "windowed",
    "hybrid": "hybrid",
}
COLUMNS = ("models", "equal to the oracle", "refused", "refused needlessly", "not judged", "findings")


def record(number: int, result: Result, seconds: float) -> dict[str, Any]:
    """The line of one model."""
    spec = draw(number)
    return {
        "number": number,
        "trunk": spec.trunk,
        "traps": traps_of(spec),
        "verdict": result.verdict,
        "mode": result.mode,
        "reason": result.reason,
        "error": result.error,
        "seconds": round(seconds, 2),
    }


def traps_of(spec: Spec) -> list[str]:
    """The names of all traps of a model."""
    found = [trap.partition(":")[0] for trap in spec.traps]
    return found + ([spec.pixel_trap] if spec.pixel_trap else [])


def read(path: Path) -> list[dict[str, Any]]:
    """The lines that are there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, line: dict[str, Any]) -> None:
    """Writes one more line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def is_trapped(line: dict[str, Any]) -> bool:
    """Whether a model holds a trap, or anything else for which it may be refused, such as column-major tokens."""
    return bool(line["traps"]) or bool(excuses(draw(line["number"])))


def rows_of(lines: list[dict[str, Any]]) -> list[list[str | int]]:
    """A row for each kind of trunk, with traps and without, and one for all: name and the numbers of `COLUMNS`."""
    rows: list[list[str | int]] = []
    for trunk, name in TRUNKS.items():
        for trapped in (False, True):
            part = [line for line in lines if line["trunk"] == trunk and is_trapped(line) == trapped]
            rows.append([f"{name}, {'with' if trapped else 'without'} traps", *_counts(part)])
    return [*rows, ["all", *_counts(lines)]]


def _counts(lines: list[dict[str, Any]]) -> list[int]:
    found = Counter(line["verdict"] for line in lines)
    verdicts = ("equal", "refused", "needless", "unjudged")
    return [len(lines), *(found[verdict] for verdict in verdicts), found["finding"] + found["broken"]]


def table(lines: list[dict[str, Any]]) -> str:
    """The table of a run in Markdown, and how often which reason was given."""
    parts = [tabulate(rows_of(lines), headers=["model", *COLUMNS], tablefmt="github")]
    for verdict in ("refused", "needless", "unjudged", "finding", "broken"):
        reasons = Counter(line["reason"] for line in lines if line["verdict"] == verdict)
        if reasons:
            counted = [[count, reason] for reason, count in reasons.most_common(40)]
            parts.append(tabulate(counted, headers=["models", verdict], tablefmt="github"))
    return "\n\n".join(parts)
