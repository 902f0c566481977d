"""A planted fault: a small change of the source text, put in place as the module is imported.

The files in `patches/` hold one after the other:

    # what is wrong
    @ the file
    = why nothing can see it, if nothing can
    -the text that is replaced, line by line
    +what stands in its place; with no such line, nothing does, not even the end of the line
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATCHES = Path(__file__).parent / "patches"


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: What is wrong, in a few words.
        path: The file, from the project's root.
        old: The text that is replaced, which stands there once.
        new: What stands in its place.
        equivalent: Why nothing can see it; empty if something must.
    """

    name: str
    path: str
    old: str
    new: str
    equivalent: str = ""

    @property
    def key(self) -> str:
        """Stands for the fault in results: it changes with the text, and not with its name."""
        return hashlib.sha256("\0".join((self.path, self.old, self.new)).encode()).hexdigest()[:12]

    @property
    def module(self) -> str:
        """Name of the module that holds it."""
        path = self.path.replace("passes/", "papr_fx/passes/") if self.path.startswith("passes/") else self.path
        return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def room(self) -> str:
        """The room that holds it."""
        return self.path.split("/")[-2]

    def function(self) -> int | None:
        """The first line of the function that holds the fault, decorators included; None if no function holds all of it."""
        text = (ROOT / self.path).read_text()
        place = text.index(self.old)
        first, last = (text.count("\n", 0, end) + 1 for end in (place, place + len(self.old.rstrip("\n"))))
        holders = [
            (node.lineno, min([node.lineno, *(made.lineno for made in node.decorator_list)]))
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef) and node.lineno <= first and last <= (node.end_lineno or 0)
        ]
        return max(holders)[1] if holders else None

    def applied(self) -> str:
        """The file's text with the fault.

        Raises:
            ValueError: The text that it replaces does not stand there once.
        """
        text = (ROOT / self.path).read_text()
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.path}: sought one place that reads {self.old!r}, found {text.count(self.old)}: {self.name}"
            )
        return text.replace(self.old, self.new)


def read_faults(file: Path) -> Iterator[Fault]:
    """The faults in a file of `patches/`."""
    for text in file.read_text().split("\n\n"):
        lines = text.strip("\n").split("\n")
        parts = {mark: [line[1:] for line in lines if line[0] == mark] for mark in "#@=-+"}
        name, path = parts["#"][0].strip(), parts["@"][0].strip()
        end = "" if parts["+"] else "\n"
        yield Fault(name, path, "\n".join(parts["-"]) + end, "\n".join(parts["+"]), " ".join(parts["="]).strip())


FAULTS = tuple(fault for file in sorted(PATCHES.glob("*.txt")) for fault in read_faults(file))
