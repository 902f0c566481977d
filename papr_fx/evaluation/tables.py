"""Files that a table lists, each with its class."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from ..errors import ArgumentError
from .classes import NATURAL, numbered, order_note, read_class_map


class TableReader:
    """Files listed in a table, by index: a line holds a path and a class, separated by a comma or a space.

    Args:
        table: The table, without a header.
        root: The folder that relative paths start from.
        class_map: A file that lists classes in the model's order. Without it, class names are numbered, and numbers are
            used as they are.
        order: How class names are numbered, as in `numbered`.

    Attributes:
        notes: How classes were numbered.

    Raises:
        ArgumentError: A line is not a path and a class, or `class_map` does not list its class.
    """

    def __init__(self, table: Path, root: Path, class_map: str = "", order: str = NATURAL) -> None:
        lines = _lines(table)
        self.notes: list[str] = []
        names = [*numbered((label for _, label in lines), order)]
        numbers = [name for name in names if re.fullmatch(r"-?\d+", name)]
        if 0 < len(numbers) < len(names) and not class_map:
            other = next(name for name in names if name not in numbers)
            raise ArgumentError(f"{table}: classes are numbers or names, not both: {numbers[0]} and {other!r} (a header?)")
        if class_map:
            classes = read_class_map(class_map, str(table.parent))
        elif numbers:
            classes = {name: int(name) for name in names}
        else:
            classes = numbered(names, order)
            self.notes.append(order_note(classes, order))
        unknown = [name for name in names if name not in classes]
        if unknown:
            raise ArgumentError(f"{table}: {class_map} does not list the class {unknown[0]!r}")
        self._files = [(root / path, classes[label]) for path, label in lines]
        if not self._files[0][0].exists():
            raise ArgumentError(f"{table}, line 1: there is no file {self._files[0][0]} (a header? a table has none)")
        self.class_to_idx = {} if numbers and not class_map else classes

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        path, label = self._files[index]
        return path.open("rb"), label

    def filename(self, index: int) -> str:
        """The path of a file."""
        return str(self._files[index][0])


def _lines(table: Path) -> Sequence[tuple[str, str]]:
    """Path and class of each line."""
    with table.open(newline="", encoding="utf-8-sig") as file:
        split = [line.strip().rsplit("," if "," in line else None, 1) for line in file if line.strip()]
    wrong = next((number for number, line in enumerate(split, 1) if len(line) != 2), 0)
    if wrong or not split:
        where = f", line {wrong}" if wrong else ""
        raise ArgumentError(f"{table}{where}: a line is a path and a class, such as `clips/a.mp4,3`")
    return [(path.strip(), label.strip()) for path, label in split]
