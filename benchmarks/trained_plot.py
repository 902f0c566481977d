"""The curve of accuracy against multiply-accumulates. `python -m benchmarks.trained_plot RECORD PNG`.

RECORD is what `benchmarks.trained_vit` has written. It draws the same curve itself with `--plot`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_STYLES = {"drop": "o--", "coarse": "s-"}
Row = Mapping[str, Any]


def draw(path: Path, rows: Sequence[Row], measured: str = "probe") -> None:
    """Draws a line for each map and background, with standard errors, from the dense model at the right to the least tokens.

    Args:
        path: The PNG file.
        rows: From `benchmarks.trained_vit.measure`; those of the dense model among them, with the map "dense".
        measured: The column.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    (dense,) = (row for row in rows if row["map"] == "dense")
    maps = list(dict.fromkeys(row["map"] for row in rows if row is not dense))
    for name in maps:
        for background, style in _STYLES.items():
            own = [row for row in rows if (row["map"], row["background"]) == (name, background)]
            _line(axes, own, measured, fmt=style, color=f"C{maps.index(name)}", label=f"{name}, {background}")
    _line(axes, [dense], measured, fmt="D", color="black", label="dense")
    axes.axhline(dense[measured], color="black", linewidth=0.5)
    axes.set(xlabel="GMACs, with embedding and proposal", ylabel=f"top-1 of the {measured}, %")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)


def _line(axes: Any, rows: Sequence[Row], measured: str, **style: Any) -> None:
    gmacs, values, errors = ([row[key] for row in rows] for key in ("GMACs", measured, f"{measured} +-"))
    axes.errorbar(gmacs, values, errors, capsize=2, **style)


def main() -> None:
    """Draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="JSON file")
    parser.add_argument("picture", type=Path, help="PNG file")
    parser.add_argument("--measured", default="probe", help="the column that is drawn: probe (default) or k-NN")
    arguments = parser.parse_args()
    draw(arguments.picture, json.loads(arguments.record.read_text())["rows"], arguments.measured)


if __name__ == "__main__":
    main()
