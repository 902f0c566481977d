"""The curve of accuracy against tokens of `benchmarks.trained_vit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_STYLES = {"drop": "o--", "coarse": "s-"}


def draw(path: Path, rows: Sequence[Mapping[str, Any]], dense: float, measured: str = "probe") -> None:
    """Draws a line for each map and background, with standard errors, and the dense model's accuracy.

    Args:
        path: The PNG file.
        rows: From `benchmarks.trained_vit.measure`.
        dense: The dense model's accuracy, in percent.
        measured: The column.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(dense, color="black", linewidth=1, label="dense")
    maps = list(dict.fromkeys(row["map"] for row in rows))
    for name in maps:
        for background, style in _STYLES.items():
            own = [row for row in rows if (row["map"], row["background"]) == (name, background)]
            tokens, values, errors = ([row[key] for row in own] for key in ("tokens", measured, f"{measured} +-"))
            color = f"C{maps.index(name)}"
            axes.errorbar(tokens, values, errors, fmt=style, color=color, capsize=2, label=f"{name}, {background}")
    axes.set(xlabel="tokens behind the choice", ylabel=f"top-1 of the {measured}, %")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)
