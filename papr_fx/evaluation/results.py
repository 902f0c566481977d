"""Files of results: written whole or not at all, and a part file from which an interrupted run goes on."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from .evaluate import Counts, Progress


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file by renaming a finished one, so that no reader ever sees half of it.

    Raises:
        ArgumentError: It cannot be written.
    """
    beside = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content if isinstance(content, bytes) else content.encode())
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise ArgumentError(f"{path} cannot be written: {error}") from error


def check_writable(path: Path, suffixes: Sequence[str]) -> None:
    """Tries whether a file can be written, before the work is done; makes its folder.

    Raises:
        ArgumentError: It cannot, or its name has none of `suffixes`.
    """
    if path.suffix not in suffixes or path.is_dir():
        raise ArgumentError(f"a file that ends in {' or '.join(suffixes)} is to be written, not {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _beside(path).touch()
        _beside(path).unlink(missing_ok=True)
    except OSError as error:
        raise ArgumentError(f"{path} cannot be written: {error}") from error


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    """Writes rows as CSV, or with the settings of the run as JSON, by the name's suffix."""
    if path.suffix == ".json":
        write_whole(path, json.dumps({"settings": dict(settings), "rows": [dict(row) for row in rows]}, indent=2) + "\n")
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def part_of(path: Path) -> Path:
    """The file beside a results file that says how far its run has come."""
    return path.with_name(f"{path.name}.part")


def write_part(path: Path, progress: Progress, settings: Mapping[str, Any]) -> None:
    """Notes how far a run has come."""
    write_whole(part_of(path), json.dumps({"settings": dict(settings), "progress": asdict(progress)}) + "\n")


def read_part(path: Path, settings: Mapping[str, Any]) -> Progress | None:
    """How far an interrupted run with the same settings came; None if there is none.

    Raises:
        ArgumentError: The part file is of a run with other settings, or is no part file.
    """
    part = part_of(path)
    if not part.exists():
        return None
    try:
        found = json.loads(part.read_text())
        given, counted = found["settings"], found["progress"]
        counts = {name: Counts(**values) for name, values in counted["counts"].items()}
        failed = [(int(place), str(reason)) for place, reason in counted["failed"]]
        progress = Progress(int(counted["done"]), int(counted["total"]), counts, failed)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(
            f"{part} does not say how far a run has come ({type(error).__name__}: {error}): remove it"
        ) from error
    wanted = json.loads(json.dumps(dict(settings)))
    differing = sorted(key for key in {*given, *wanted} if given.get(key) != wanted.get(key))
    if differing:
        raise ArgumentError(
            f"{part} is of an interrupted run with other settings ({', '.join(differing)}): remove it, or give another "
            "--results-file"
        )
    return progress
