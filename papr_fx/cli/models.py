"""`papr-fx models`: which architectures of a library can be pruned, and why the others are refused."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import ArgumentError
from ..evaluation import page
from ..evaluation.columns import with_columns
from ..evaluation.survey import survey
from ..evaluation.zoo import LIBRARIES, architectures
from ..planning.module import checked_z
from .options import positive_int


def add_models(command: argparse.ArgumentParser) -> None:
    """Adds the options of `papr-fx models`."""
    command.set_defaults(run=run_models)
    command.add_argument("--library", choices=LIBRARIES, nargs="+", default=["timm"])
    command.add_argument(
        "--filter",
        nargs="+",
        default=[],
        metavar="GLOB",
        help="architectures or families, which are modules of the library (default: transformers and similar networks)",
    )
    command.add_argument("--z", type=float, default=0.5, help="keep ratio")
    command.add_argument("--workers", type=positive_int, default=1, help="processes of one thread each (default: %(default)s)")
    command.add_argument("--table", type=Path, help="also write the tables to this Markdown file")
    command.add_argument(
        "--columns",
        action="store_true",
        help="take the rows that --table has, and fill in what its columns `narrowed` and `bfloat16` lack",
    )


def run_models(arguments: argparse.Namespace) -> None:
    """Runs `papr-fx models`."""
    if arguments.columns and not (arguments.table and arguments.table.exists()):
        raise ArgumentError("--columns reads the rows of a table that was written before: give it by --table")

    def progress(line: str) -> None:
        print(line, file=sys.stderr)

    z = checked_z(arguments.z)
    if arguments.columns:
        rows = page.load(arguments.table)
    else:
        chosen = [a for library in arguments.library for a in architectures(library, arguments.filter)]
        rows = survey(chosen, z, workers=arguments.workers, progress=progress)
    rows = with_columns(rows, z, workers=arguments.workers, patterns=arguments.filter or ["*"], progress=progress)
    print(page.tables(rows))
    if arguments.table:
        arguments.table.parent.mkdir(parents=True, exist_ok=True)
        arguments.table.write_text(page.document(rows, arguments.z))
