"""The plot of `papr-fx eval` and `reproduce`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..evaluation.results import write_whole


def plot_accuracy(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes `accuracy_figure` as a PNG file."""
    picture = io.BytesIO()
    accuracy_figure(rows).savefig(picture, format="png", dpi=150)
    write_whole(path, picture.getvalue())


def accuracy_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy against GMACs; agreement with the dense model if the data has no classes.

    Where they were measured, a dashed line is the dense model's accuracy, and a dotted one that of a random map.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    measured = "top1" if "top1" in rows[0] else "agreement"
    axes.plot([row["gmacs"] for row in rows], [row[measured] for row in rows], "o-")
    for row in rows:
        text = f"z={row['z']:g}" + (f" r={row['r']}" if row["r"] else "")
        axes.annotate(text, (row["gmacs"], row[measured]), xytext=(4, -10), textcoords="offset points", fontsize=8)
    by_chance = [row for row in rows if f"random_{measured}" in row]
    if by_chance:
        values = [row[f"random_{measured}"] for row in by_chance]
        axes.plot([row["gmacs"] for row in by_chance], values, "o:", label="random map")
    dense = [row["top1"] for row in rows if "top1" in row and row["z"] == 1 and not row["r"]]
    if dense:
        axes.axhline(dense[0], color="black", linewidth=1, linestyle="--", label="dense")
    if dense or by_chance:
        axes.legend(fontsize=8)
    label = {"top1": "top-1, %", "agreement": "agreement with the dense model, %"}[measured]
    axes.margins(x=0.15)  # room for the last annotation
    axes.set(xlabel="GMACs, proposal included", ylabel=label, title=rows[0]["model"])
    return figure
