"""What a survey found, as Markdown: tables for the terminal, and the whole of docs/coverage.md."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from importlib.metadata import version

import torch
from tabulate import tabulate

from .survey import Row
from .zoo import LIBRARIES, architectures


def table(rows: Iterable[Row]) -> str:
    """One line per architecture; the reasons of refusals are numbered below it."""
    reasons: dict[str, str] = {}
    cells = [
        (
            row.architecture.family,
            row.architecture.name,
            (row.mode or "refused") + (" (features)" if row.output == "features" else ""),
            row.sites or "",
            row.positions,
            row.proof if row.mode else reasons.setdefault(row.reason, f"reason {len(reasons) + 1}"),
        )
        for row in rows
    ]
    headers = ["family", "model", "mode", "sites", "positions", "proof"]
    lines = tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)
    return "\n".join([lines, "", *(f"{number}: {text}.  " for text, number in reasons.items())]).rstrip()


def summary(rows: Iterable[Row]) -> str:
    """One line per family: how many of its models are pruned by tokens, pruned by pixels, or refused."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for family in (row.architecture.family, "all"):
            counts[family][row.mode or "refused"] += 1
    ordered = [*(family for family in counts if family != "all"), "all"]
    cells = [
        (family, counts[family].total(), *(counts[family][mode] for mode in ("tokens", "pixels", "refused")))
        for family in ordered
    ]
    return tabulate(cells, headers=["family", "models", "tokens", "pixels", "refused"], tablefmt="github")


def tables(rows: Sequence[Row]) -> str:
    """Summary and table of each library."""
    libraries = dict.fromkeys(row.architecture.library for row in rows)
    by_library = {library: [row for row in rows if row.architecture.library == library] for library in libraries}
    return "\n\n".join(f"## {name} {version(name)}\n\n{summary(own)}\n\n{table(own)}" for name, own in by_library.items())


def document(rows: Sequence[Row], z: float) -> str:
    """The whole page: what was done, the default families that are not among `rows`, and the tables."""
    tried = {(row.architecture.library, row.architecture.family) for row in rows}
    default = dict.fromkeys((a.library, a.family) for library in LIBRARIES for a in architectures(library))
    missing = [f"{family} ({library})" for library, family in default if (library, family) not in tried]
    return f"{head(torch.__version__, z)}Not tried: {', '.join(missing) or 'none'}.\n\n{tables(rows)}\n"


def head(torch_version: str, z: float) -> str:
    """The first lines of the page, up to what was not tried."""
    return (
        f"# What is pruned\n\ntorch {torch_version}; keep ratio {z:g}; written by `make coverage`.\n\n"
        "Every architecture is built with random weights and transformed. Two architectures of a family have the same\n"
        "structure if their graphs, traced through all modules, differ only in sizes and indices. The smallest\n"
        "architecture of each structure is proved numerically; one with more than 100 M parameters is proved with two\n"
        "blocks, if that keeps its structure. The others are transformed without weights. If the smallest is refused, so\n"
        "are the others.\n\n"
    )
