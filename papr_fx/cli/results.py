"""What an evaluation prints and writes: a row per variant, the samples that could not be read, the results file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

from ..evaluation.chance import compared
from ..evaluation.counts import Counts, Progress, count_parameters
from ..evaluation.results import remove_part, write_rows
from ..evaluation.subject import Subject
from ..evaluation.variants import Variant
from ..planning.module import PrunedModule


def row_of(subject: Subject, variant: Variant, found: Progress) -> dict[str, Any]:
    """The results of one variant: percentages, GMACs, samples per second of one process, millions of parameters."""
    counts = found.counts[variant.name]
    row: dict[str, Any] = {"z": variant.z, "r": variant.r, **_shares(counts, found.total)}
    if variant.twin is not None:
        versus = compared(found, variant.name, cast(PrunedModule, variant.module))
        shares = _shares(found.counts[variant.twin_name], found.total)
        row |= {f"random_{word}": shares[word] for word in ("top1", "agreement") if word in shares}
        row |= {"map_gain": round(versus.difference, 3), "map_gain_error": round(versus.error, 3), "verdict": versus.verdict}
    return row | {
        "gmacs": variant.macs / 1e9,
        speed_key(subject): found.total / counts.seconds,
        "param_count": round(count_parameters(variant.module) / 1e6, 2),
        "count": found.total,
        "unreadable": len(found.failed),
    }


def _shares(counts: Counts, total: int) -> dict[str, float]:
    """What was counted, as percentages."""
    shares: dict[str, float] = {}
    if counts.labelled:
        shares |= {word: round(100 * getattr(counts, word) / counts.labelled, 3) for word in ("top1", "top5")}
    if counts.real_total:
        shares["top1_real"] = round(100 * counts.real / counts.real_total, 3)
    return {**shares, "agreement": round(100 * counts.agree / total, 3)}


def print_verdicts(variants: Sequence[Variant], found: Progress, kind: str) -> None:
    """Says of each variant that has a twin whether its map is better than a random one."""
    for variant in variants:
        if variant.twin is not None:
            versus = compared(found, variant.name, cast(PrunedModule, variant.module))
            print(f"z={variant.z:g}: {versus.said(kind)} (map - random: {versus} points)")


def speed_key(subject: Subject) -> str:
    """Name of the column of speeds."""
    return "videos_per_sec" if subject.views else "img_per_sec"


def finish(arguments: argparse.Namespace, rows: Sequence[Mapping[str, Any]], failed: Sequence[tuple[int, str]]) -> None:
    """Lists what could not be read, and writes the results and the plot."""
    print_failed([reason for _, reason in failed])
    if arguments.results_file:
        settings = {key: value for key, value in vars(arguments).items() if key not in ("run", "results_file", "plot")}
        write_rows(arguments.results_file, rows, {**settings, "failed": failed})
        remove_part(arguments.results_file)
    if arguments.plot:
        from .plot import plot_accuracy  # imports matplotlib

        plot_accuracy(arguments.plot, rows)


def print_failed(reasons: Sequence[str]) -> None:
    """Lists what could not be read."""
    if reasons:
        print(f"{len(reasons)} could not be read and were left out:", *reasons, sep="\n  ", file=sys.stderr)
