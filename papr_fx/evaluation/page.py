"""What a survey found, as Markdown: tables for the terminal, and the whole of docs/coverage.md."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from tabulate import tabulate

from ..errors import ArgumentError, first_line
from .survey import Row
from .zoo import LIBRARIES, Architecture, architectures

_ANEW = "mend it, or write the page anew, without --columns"
_HEADERS = ["family", "model", "mode", "sites", "positions", "proof", "narrowed", "bfloat16"]


def table(rows: Iterable[Row]) -> str:
    """One line per architecture; the reasons of refusals are numbered below it."""
    reasons: dict[str, str] = {}

    def numbered(text: str) -> str:
        return reasons.setdefault(text, f"reason {len(reasons) + 1}")

    cells = [
        (
            row.architecture.family,
            row.architecture.name,
            (row.mode or "refused") + (" (features)" if row.output == "features" else ""),
            row.sites or "",
            row.positions,
            row.proof if row.mode else numbered(row.reason),
            row.narrowed,
            numbered(row.bfloat16) if row.bfloat16.startswith("no: ") else row.bfloat16,
        )
        for row in rows
    ]
    lines = tabulate(cells, headers=_HEADERS, tablefmt="github", disable_numparse=True)
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


def read(text: str) -> list[Row]:
    """The rows of a page that `document` wrote.

    Raises:
        ArgumentError: A row is not as it writes them.
    """
    rows: list[Row] = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        library = section.partition(" ")[0].strip()
        reasons = dict(re.findall(r"^(reason \d+): (.*)\. *$", section, flags=re.MULTILINE))
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
        for cells in lines:
            if len(cells) == len(_HEADERS) and cells[0] != "family" and not set(cells[0]) <= {"-"}:
                rows.append(_checked_row(library, cells, reasons))
    return rows


def load(path: Path) -> list[Row]:
    """The rows of a file that holds a page.

    Raises:
        ArgumentError: It cannot be read, or a row is not as `document` writes them.
    """
    try:
        return read(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"cannot read the table in {path}: {error}") from error


def _checked_row(library: str, cells: Sequence[str], reasons: Mapping[str, str]) -> Row:
    try:
        row = _row(library, cells, reasons)
    except (KeyError, ValueError) as error:
        raise ArgumentError(f"the row of {cells[1]!r} is damaged ({first_line(error)}): {_ANEW}") from error
    if library not in LIBRARIES or row.mode not in ("", "tokens", "pixels"):
        raise ArgumentError(f"the row of {cells[1]!r} is damaged: it is of {library!r}, in mode {cells[2]!r}: {_ANEW}")
    return row


def _row(library: str, cells: Sequence[str], reasons: Mapping[str, str]) -> Row:
    family, name, mode, sites, positions, proof, narrowed, half = cells
    word, _, output = mode.partition(" ")
    architecture = Architecture(library, family, name)
    if word == "refused":
        return Row(architecture, reason=reasons[proof])
    output = output.strip("()") or "logits"
    return Row(architecture, word, output, int(sites), positions, proof, "", narrowed, reasons.get(half, half))


def head(torch_version: str, z: float) -> str:
    """The first lines of the page, up to what was not tried."""
    return (
        f"# What is pruned\n\ntorch {torch_version}; keep ratio {z:g}; written by `make coverage`.\n\n"
        "Every architecture is built with random weights and transformed. Two architectures of a family have the same\n"
        "structure if their graphs, traced through all modules, differ only in sizes and indices. The smallest\n"
        "architecture of each structure is proved numerically; one with more than 100 M parameters is proved with two\n"
        "blocks, if that keeps its structure. The others are transformed without weights. If the smallest is refused, so\n"
        "are the others.\n\n"
        "Narrowed: rows that nobody reads are left out. bfloat16: one of each structure, with two blocks where their\n"
        "number can be chosen, is transformed in bfloat16 and run; converted to float32 it gives about the same, or the\n"
        "dense model is as far off. What is empty there was not tried; `make coverage-columns` fills it in.\n\n"
    )
