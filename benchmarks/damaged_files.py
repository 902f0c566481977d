"""Damaged files of every kind that papr-fx reads. `python -m benchmarks.damaged_files --count 2000 --seed 0`.

Small whole files are damaged at random, see `mutations`; and some are made by hand to do harm, see `harmful_files`. Each is
read in a process of its own. It is read, or named as unreadable, or refused by a `PaprError`. Anything else is a fault: another
exception, no end, a crash, too much memory, or code in the file that ran. The exit code is 1 if there is one.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

from .attempts import SOUND, Attempt, attempt
from .file_kinds import kinds
from .harmful_files import MARK, Files, harmful
from .mutations import damaged
from .read_file import Kind
from .record import write

_SECONDS, _MEGABYTES = 30.0, 2000.0


@dataclass(frozen=True)
class Case:
    """A file, and what came of it."""

    kind: str
    damage: str
    seed: int
    found: Attempt


class Bench:
    """Whole files of each kind in a folder, and room for the damaged one."""

    def __init__(self, folder: Path, chosen: Sequence[Kind]) -> None:
        self._whole, self._room = folder / "whole", folder / "room"
        self._mark = folder / MARK
        self.kinds = list(chosen)
        for number, kind in enumerate(self.kinds):
            (self._whole / str(number)).mkdir(parents=True)
            kind.write(self._whole / str(number))
        self.contents = [(self._whole / str(number) / kind.file).read_bytes() for number, kind in enumerate(self.kinds)]

    def check_whole(self) -> None:
        """Reads each whole file, in this process: what is imported now need not be imported in each."""
        for number, kind in enumerate(self.kinds):
            shutil.copytree(self._whole / str(number), self._room)
            try:
                found = kind.read(self._room)
            finally:
                shutil.rmtree(self._room)
            assert found == "read", f"{kind.name}: {found}"

    def at_random(self, seed: int) -> Case:
        """A damaged file."""
        draw = random.Random(seed)
        number = draw.randrange(len(self.kinds))
        if draw.random() < 0.04:
            name, content = "another file", draw.choice(self.contents)
        else:
            name, content = damaged(self.contents[number], draw)
        return self._tried(number, name, seed, {self.kinds[number].file: content})

    def by_hand(self) -> Iterable[Case]:
        """The files that are made to do harm."""
        numbers = {kind.name: number for number, kind in enumerate(self.kinds)}
        for place, (kind, name, files) in enumerate(harmful(self._mark)):
            if kind in numbers:
                yield self._tried(numbers[kind], name, -1 - place, files)

    def _tried(self, number: int, name: str, seed: int, files: Files) -> Case:
        """Reads a kind with some of its files replaced, or removed."""
        kind = self.kinds[number]
        shutil.copytree(self._whole / str(number), self._room)
        try:
            for file, content in files.items():
                (self._room / file).unlink(missing_ok=True)
                if content is not None:
                    (self._room / file).write_bytes(content if isinstance(content, bytes) else content())
            found = attempt(lambda: kind.read(self._room), _SECONDS, _MEGABYTES)
        finally:
            shutil.rmtree(self._room)
        if self._mark.exists():
            self._mark.unlink()
            found = Attempt("executed", found.message, found.seconds, found.megabytes)
        return Case(kind.name, name, seed, found)


def run(count: int, seed: int, only: str = "") -> list[Case]:
    """Reads `count` files that are damaged at random, and those that are made to do harm.

    Args:
        count: How many.
        seed: The first seed; each file has the next one.
        only: Kinds whose names hold this.
    """
    torch.set_num_threads(1)
    chosen = [kind for kind in kinds() if only in kind.name]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), chosen)
        bench.check_whole()
        cases = [*bench.by_hand()]
        return [*cases, *(bench.at_random(seed + place) for place in tqdm(range(count), unit="file", disable=None))]


def row_of(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """One row per kind: how many files, and what came of them."""
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for case in cases:
        by_kind[case.kind][case.found.outcome] += 1
    words = [*SOUND, *sorted({case.found.outcome for case in cases} - {*SOUND})]
    return [
        {"kind": kind, "files": counts.total(), **{word: counts[word] for word in words}} for kind, counts in by_kind.items()
    ]


def grouped(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for all kinds that begin alike: images of all formats, checkpoints of all kinds."""
    sums: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        sums[row["kind"].partition(":")[0]].update({key: value for key, value in row.items() if key != "kind"})
    return [{"kind": kind, **counts} for kind, counts in sorted(sums.items())]


def faults(cases: Iterable[Case]) -> list[Case]:
    """What must not be."""
    return [case for case in cases if case.found.outcome not in SOUND]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown, and their sum."""
    counted = [key for key in rows[0] if key != "kind"]
    total = {"kind": "all", **{key: sum(row[key] for row in rows) for key in counted}}
    return tabulate([*rows, total], headers="keys", tablefmt="github")


def main() -> None:
    """Runs, prints the table and the faults, and writes the JSON file; or prints the table of a file that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds whose names hold this")
    parser.add_argument("--out", type=Path, default=Path("out/damaged_files.json"))
    parser.add_argument("--table", action="store_true", help="run nothing: print the table of --out, shortened")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(grouped(row for row in json.loads(arguments.out.read_text())["rows"] if "kind" in row)))
        return
    cases = run(arguments.count, arguments.seed, arguments.only)
    rows = row_of(cases)
    wrong = faults(cases)
    slowest = max(cases, key=lambda case: case.found.seconds)
    largest = max(cases, key=lambda case: case.found.megabytes)
    print(table(rows))
    for word, case in (("slowest", slowest), ("most memory", largest)):
        print(f"{word}: {case.kind}, {case.damage}: {case.found.seconds:.1f} s, {case.found.megabytes:.0f} MB")
    for case in wrong:
        print(f"{case.found.outcome}: {case.kind}, {case.damage}, seed {case.seed}: {case.found.message}")
    write(arguments.out, [*rows, {"faults": [asdict(case) for case in wrong]}], seed=arguments.seed)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
