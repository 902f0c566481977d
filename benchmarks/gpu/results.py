"""The file of results: rewritten as a whole after each row, so that nothing is lost, and read by a run that goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.record import environment

from .jobs import Task

Row = dict[str, Any]
FILE = "gpu.json"


@dataclass
class Results:
    """Rows and failures, in `gpu.json`, and lines of a log.

    Attributes:
        folder: Where the files lie.
        rows: Each with its part and task.
        errors: What failed: task, what, why.
        done: Names of tasks that are complete.
        left: Names of tasks for which there was no time.
    """

    folder: Path
    rows: list[Row] = field(default_factory=list[Row])
    errors: list[Row] = field(default_factory=list[Row])
    done: list[str] = field(default_factory=list[str])
    left: list[str] = field(default_factory=list[str])
    _told: set[str] = field(default_factory=set[str])

    @classmethod
    def open(cls, folder: Path, earlier: Path | None) -> Results:
        """Those of an earlier run's file, if it exists."""
        folder.mkdir(parents=True, exist_ok=True)
        found = cls(folder)
        if earlier and earlier.exists():
            kept = json.loads(earlier.read_text())
            found.rows, found.errors, found.done = kept["rows"], kept["errors"], kept["done"]
        return found

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / FILE

    @property
    def log(self) -> Path:
        """What the run and its processes print."""
        return self.folder / "log.txt"

    def to_do(self, tasks: Sequence[Task]) -> list[Task]:
        """The tasks that are not complete. Those of which something failed come last, and their failures are forgotten."""
        failed = {error["task"] for error in self.errors}
        left = [task for task in tasks if task.name not in self.done]
        names = {task.name for task in left}
        self.errors = [error for error in self.errors if error["task"] not in names]
        return [*(t for t in left if t.name not in failed), *(t for t in left if t.name in failed)]

    def tell(self, task: Task, row: Row) -> None:
        """Adds a row. The first of a task replaces what an earlier run found of it."""
        if task.name not in self._told:
            self._told.add(task.name)
            self.rows = [row for row in self.rows if row["task"] != task.name]
        self.rows.append({"task": task.name, "part": task.part, **row})
        self.write()
        self.say(f"{task.name}: {_words(row)}")

    def complete(self, task: Task) -> None:
        """Notes that a later run need not do it again."""
        self.done.append(task.name)
        self.write()

    def fail(self, task: Task, what: str, why: str) -> None:
        """Adds a failure."""
        self.errors.append({"task": task.name, "what": what, "why": why})
        self.write()
        self.say(f"{task.name}: {what} FAILED: {why.splitlines()[-1]}")

    def say(self, line: str) -> None:
        """Prints a line with the time, and logs it."""
        text = f"{datetime.now():%H:%M:%S} {line}"
        print(text, flush=True)
        with self.log.open("a") as file:
            file.write(text + "\n")

    def write(self) -> None:
        """Writes all of it, at once or not at all."""
        kept = {"environment": environment(0), "rows": self.rows, "errors": self.errors, "done": self.done}
        kept["left for want of time"] = self.left
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(kept, indent=1) + "\n")
        part.replace(self.path)

    @property
    def wrong(self) -> list[Row]:
        """The rows that say that something is not as it should be."""
        return [row for row in self.rows if row.get("ok") is False]


def _words(row: Row) -> str:
    """A row in one line."""
    cells = {key: value for key, value in row.items() if key not in ("subject", "kernels", "ms range") and value is not None}
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in cells.items())
