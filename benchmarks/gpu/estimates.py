"""What `benchmarks.cuda_lowering` estimated without a GPU, beside what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .speed import DENSE
from .subjects import SUBJECTS

Row = dict[str, Any]
_PAGE = Path(__file__).parents[2] / "docs" / "speed.md"
_HEAD = re.compile(r"\|\s*model\s*\|\s*z\s*\|\s*proposal\s*\|\s*kernels dense, proposal, pruned")


class Estimate(NamedTuple):
    """Estimated ms of a batch of 128 in bfloat16, dense and pruned."""

    subject: str
    variant: str
    dense: float
    pruned: float


def estimates(path: Path | None) -> list[Estimate]:
    """Those of a file that `benchmarks.cuda_lowering` wrote, or of the table in docs/speed.md.

    Raises:
        ValueError: The file holds none.
    """
    found = _of_json(path) if path else _of_page(_PAGE.read_text())
    if not found:
        raise ValueError(f"--estimates: no row with 'ms dense' and 'ms pruned' of a known model in {path or _PAGE}")
    return found


def _of_json(path: Path) -> list[Estimate]:
    names = {subject.model: name for name, subject in SUBJECTS.items()}
    rows = [row for row in json.loads(path.read_text())["rows"] if row["model"] in names]
    return [Estimate(names[row["model"]], row["proposal"], row["ms dense"], row["ms pruned"]) for row in rows]


def _of_page(text: str) -> list[Estimate]:
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if _HEAD.match(line)), len(lines))
    found: list[Estimate] = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        model, _, proposal, _, _, times, _ = (cell.strip() for cell in line.strip("|").split("|"))
        dense, _, pruned = map(float, times.split(","))
        found.append(Estimate(model.removesuffix("/16"), proposal, dense, pruned))
    return found


def beside(rows: Sequence[Row], found: Sequence[Estimate], batch: int) -> list[Row]:
    """One row for each estimate whose model was measured at that batch size, with CUDA graphs where there are both."""
    measured = {
        (row["subject"], row["variant"]): row
        for mode in ("autotune", "graphs")  # the later one holds
        for row in rows
        if row["part"] == "speed" and row["run"] == mode and row["batch"] == batch
    }
    told: list[Row] = []
    for subject, variant, dense, pruned in found:
        if (subject, DENSE) not in measured or (subject, variant) not in measured:
            continue
        own = {"ms dense": measured[subject, DENSE]["ms"], "ms pruned": measured[subject, variant]["ms"]}
        guessed = {"estimated ms dense": dense, "estimated ms pruned": pruned, "estimated speed-up": dense / pruned}
        speed = measured[subject, variant]["speed-up"]
        told.append({"subject": subject, "variant": variant, **guessed, **own, "speed-up": speed})
    return told
