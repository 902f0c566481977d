"""The classes of labelled files: how they are numbered, and the file that lists them."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from timm.data.readers.class_map import load_class_map
from timm.utils.misc import natural_key

from ..errors import ArgumentError

# What reading a list or a pickle raises.
_DAMAGED = (
    *(OSError, EOFError, ValueError, AssertionError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError),
    pickle.UnpicklingError,
)
NATURAL, TORCHVISION = ORDERS = ("natural", "torchvision")


def numbered(names: Iterable[str], order: str) -> dict[str, int]:
    """Numbers the names of classes from 0.

    Args:
        names: Names of classes.
        order: "natural", as timm does (2 before 10, a before B), or "torchvision", by character (10 before 2, B before a).
    """
    key = _natural if order == NATURAL else str
    return {name: place for place, name in enumerate(sorted({*names}, key=key))}


def _natural(name: str) -> tuple[object, str]:
    return natural_key(name), name  # names that differ only in case have one natural key


def order_note(classes: Mapping[str, int], order: str) -> str:
    """Says how classes were numbered."""
    names = [f"{number} = {name}" for name, number in sorted(classes.items(), key=lambda item: item[1])]
    shown = names if len(names) <= 6 else [*names[:3], "...", *names[-2:]]
    other = TORCHVISION if order == NATURAL else NATURAL
    differs = f"; --class-order {other} numbers them otherwise" if numbered(classes, other) != dict(classes) else ""
    return f"{len(classes)} classes in {order} order: {', '.join(shown)}{differs}"


def read_class_map(file: str, root: str = "") -> dict[str, int]:
    """Reads a file that lists classes in the model's order: a `.txt` file of names, or a `.pkl` file of a dict.

    Args:
        file: Its name, from the working folder or from `root`.
        root: Another folder to look in.

    Raises:
        ArgumentError: There is no such file, or it does not list classes.
    """
    path = Path(file) if Path(file).exists() else Path(root, file)
    try:
        pickled = path.suffix.lower() == ".pkl"
        given = _Plain.read(path) if pickled else file  # older versions of timm would run what a pickle names
        classes: dict[str, int] = load_class_map(given, root)
        lines = _lines(path) if file.endswith(".txt") else [*classes]
    except _DAMAGED as error:
        raise ArgumentError(f"--class-map {file}: {error}") from error
    wrong = next((name for name, number in classes.items() if type(number) is not int), None)
    if wrong is not None:
        raise ArgumentError(f"--class-map {file}: the number of {wrong!r} is {classes[wrong]!r}")
    if "" in lines:
        raise ArgumentError(f"--class-map {file}: line {lines.index('') + 1} is empty, and would count as a class")
    twice = next((name for name, count in Counter(lines).items() if count > 1), None)
    if twice is not None:
        raise ArgumentError(f"--class-map {file} lists {twice!r} twice: its number is not clear")
    return {name: classes[name] for name in lines}


class _Plain(pickle.Unpickler):
    """Reads pickles of numbers, texts and dictionaries alone."""

    @classmethod
    def read(cls, path: Path) -> dict[str, int]:
        """The dictionary in a file."""
        content = path.read_bytes()
        _check_pickle(content)
        found = cls(io.BytesIO(content)).load()
        if not isinstance(found, dict):
            raise ValueError(f"sought a dictionary of names and numbers, found {type(found).__name__}")
        return cast("dict[str, int]", found)

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"sought names and numbers, found {module_name}.{global_name}, which is not loaded")


def _lines(file: Path) -> list[str]:
    """The names in a file, without empty lines at its end."""
    return [line.strip() for line in file.read_text(encoding="utf-8").rstrip().splitlines()]


def _check_pickle(content: bytes) -> None:
    """Reads a pickle without loading it: a few bytes of it can make the loader ask for all memory there is.

    Raises:
        ValueError: It is damaged.
    """
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name.endswith(("PUT", "FRAME")) and cast(int, argument) > len(content):
            raise ValueError(f"{opcode.name} says {argument}, and the file has {len(content)} bytes")
