"""Files of results, written whole or not at all; and a part file from which an interrupted run continues."""

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
from .counts import Counts, Progress


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a temporary file and renames it, so that no reader ever sees half of it.

    Raises:
        ArgumentError: The file cannot be written.
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise ArgumentError(f"{path} cannot be written: {error}") from error


def check_writable(path: Path, suffixes: Sequence[str]) -> None:
    """Checks that a file can be written, before the work is done, and makes its folder.

    Raises:
        ArgumentError: It cannot, or its name ends in none of `suffixes`.
    """
    if path.suffix not in suffixes or path.is_dir():
        raise ArgumentError(f"the file to write must end in {' or '.join(suffixes)}, not {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _temporary(path).touch()
        _temporary(path).unlink(missing_ok=True)
    except OSError as error:
        raise ArgumentError(f"{path} cannot be written: {error}") from error


def _temporary(path: Path) -> Path:
    """A file beside `path` that only this process writes."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    """Writes rows: as CSV, or as JSON with the settings of the run, by the suffix of the file name."""
    if path.suffix == ".json":
        write_whole(path, json.dumps({"settings": dict(settings), "rows": [dict(row) for row in rows]}, indent=2) + "\n")
        return
    text = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)  # a row may lack some: they stay empty
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def part_of(path: Path) -> Path:
    """The part file of a results file: it says how far the run has come."""
    return path.with_name(f"{path.name}.part")


def write_part(path: Path, progress: Progress, settings: Mapping[str, Any]) -> None:
    """Writes how far a run has come to its part file."""
    write_whole(part_of(path), json.dumps({"settings": dict(settings), "progress": asdict(progress)}) + "\n")


def remove_part(path: Path) -> None:
    """Removes the part file of a results file, and temporary files that killed runs left beside it."""
    part_of(path).unlink(missing_ok=True)
    beginnings = [f".{file.name}." for file in (path, part_of(path))]
    for file in [*path.parent.iterdir()] if path.parent.is_dir() else []:
        if any(file.name.removeprefix(beginning).isdigit() for beginning in beginnings if file.name.startswith(beginning)):
            file.unlink(missing_ok=True)


def read_part(path: Path, settings: Mapping[str, Any]) -> Progress | None:
    """Reads how far an interrupted run with the same settings came; None if there was no such run.

    Raises:
        ArgumentError: The part file belongs to a run with other settings, or cannot be read.
    """
    part = part_of(path)
    if not part.exists():
        return None
    try:
        found = json.loads(part.read_text())
        given = {**found["settings"]}
        progress = _progress(found["progress"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ArgumentError(
            f"{part} does not say how far a run has come ({type(error).__name__}: {error}): remove it"
        ) from error
    wanted = json.loads(json.dumps(dict(settings)))
    differing = sorted(key for key in {*given, *wanted} if given.get(key) != wanted.get(key))
    if differing:
        raise ArgumentError(
            f"{part} belongs to an interrupted run with other settings ({', '.join(differing)}): remove it, or give another "
            "--results-file"
        )
    return progress


def _progress(said: Mapping[str, Any]) -> Progress:
    """How far a run came, as its part file says."""
    counts = {name: Counts(**values) for name, values in said["counts"].items()}
    numbers = [value for of_one in counts.values() for value in vars(of_one).values()]
    done, total = int(said["done"]), int(said["total"])
    if not 0 <= total <= done or not all(isinstance(number, int | float) for number in numbers):
        raise ValueError(f"it says {total} of {done} samples, and counts {numbers}")
    return Progress(done, total, counts, [(int(place), str(reason)) for place, reason in said["failed"]])
