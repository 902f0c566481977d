"""The results as one page of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from .jobs import CORRECTNESS, ESTIMATES, KERNELS, SPEED, TRAINING
from .results import Results, Row

_TIMES = ("variant", "ms", "images/s", "speed-up", "MAC ratio", "of it", "GMACs", "MB", "s of first call")
_TITLES = {
    CORRECTNESS: "Correctness",
    SPEED: "Speed, bfloat16",
    TRAINING: "Steps of training, bfloat16",
    KERNELS: "Dearest kernels, where a speed-up is below 0.9 of its MAC ratio",
    ESTIMATES: "Estimated without a GPU, beside measured",
}


def page(results: Results, environment: dict[str, Any]) -> str:
    """All results: failures first, then a section for each part."""
    words = ", ".join(f"{key} {value}" for key, value in environment.items())
    lines = ["# On a GPU", "", words, "", *_failures(results)]
    for part, title in _TITLES.items():
        rows = [row for row in results.rows if row["part"] == part]
        if not rows:
            continue
        lines += [f"## {title}", ""]
        if part == KERNELS:
            lines += [line for row in rows for line in _kernels(row)]
        elif part in (SPEED, TRAINING):
            lines += [line for name in dict.fromkeys(row["task"] for row in rows) for line in _timed(rows, name)]
        else:
            lines += [_table(rows, [k for k in dict.fromkeys(k for r in rows for k in r) if k not in ("task", "part")]), ""]
    return "\n".join(lines)


def _failures(results: Results) -> list[str]:
    lines = [f"- not as it should be: {row['task']}: {row.get('check', row.get('variant'))}" for row in results.wrong]
    lines += [f"- failed: {e['task']}: {e['what']}: {e['why'].splitlines()[-1]}" for e in results.errors]
    lines += [f"- no time for: {name}" for name in results.left]
    return [*(lines or ["Nothing failed."]), ""]


def _timed(rows: Sequence[Row], name: str) -> list[str]:
    own = [row for row in rows if row["task"] == name]
    first = own[0]
    return [f"### {first['subject']}, {first['run']}, batch {first['batch']}", "", _table(own, _TIMES), ""]


def _kernels(row: Row) -> list[str]:
    title = f"### {row['subject']}, {row['run']}, batch {row['batch']}: {row['variant']}"
    return [title, "", _table(row["kernels"], ("kernel", "launches", "ms")), ""]


def _table(rows: Sequence[Row], keys: Sequence[str]) -> str:
    cells = [[_cell(row.get(key)) for key in keys] for row in rows]
    return tabulate(cells, headers=list(keys), tablefmt="github", disable_numparse=True)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if not isinstance(value, float):
        return str(value).replace("|", "/")
    return f"{value:.1e}" if value and abs(value) < 1e-2 else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
