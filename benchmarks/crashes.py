"""`papr-fx eval` that is killed at random, and started again until it ends. `python -m benchmarks.crashes --kills 30`.

A tiny ViT is evaluated on small pictures in class folders. SIGKILL comes after a random time; or when the process opens or
renames a file beside its results, or has written half of one. Each time, what lies there is looked at: a results file is whole
or not there, a part file is whole and never says less than before. The counts at the end are those of a run that nobody killed.
"""

import argparse
import csv
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from tabulate import tabulate

from papr_fx.cli.main import main as papr_fx_main
from papr_fx.evaluation.results import part_of

from .record import write

PICTURES, CLASSES = 120, 4
WAYS = ("after a time", "at a file", "half of a file")
_TIMES = ("img_per_sec",)  # what may differ between two runs


class UnsoundError(Exception):
    """A crash left something that must not be, or changed what was counted."""


@dataclass
class Found:
    """What was seen.

    Attributes:
        kills: How often a run was killed, by how it was.
        runs: How often a run came to its end.
        continued: How often a run began where another had come to.
        litter: Temporary files that killed runs left.
    """

    kills: Counter[str] = field(default_factory=Counter[str])
    runs: int = 0
    continued: int = 0
    litter: int = 0


class Evaluation:
    """An evaluation in a folder, that can be started in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._data = folder, folder / "data"
        torch.manual_seed(0)
        for number in range(PICTURES):
            path = self._data / f"class{number % CLASSES}" / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(256, (4, 4, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).resize((64, 64), Image.Resampling.NEAREST).save(path)
        (self._data / "class1" / "001.png").write_bytes(b"no image")
        torch.save(timm.create_model("test_vit", num_classes=CLASSES).state_dict(), folder / "model.pth")

    def arguments(self, results: Path) -> list[str]:
        """Of the command line. A chunk is 32 pictures."""
        given = ["eval", self._data, "--model", "test_vit", "--num-classes", CLASSES, "--checkpoint", self.folder / "model.pth"]
        given += ["--proposal", "test_resnet", "--img-size", 64, "--z", 0.5, "--batch-size", 1, "--workers", 0]
        return [str(part) for part in [*given, "--results-file", results]]

    def started(self, results: Path, prepare: Callable[[], object] = lambda: None) -> int:
        """Starts it, and returns the number of its process."""
        sys.stdout.flush()
        child = os.fork()
        if child:
            return child
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nothing, number)
        torch.set_num_threads(1)
        prepare()
        os._exit(papr_fx_main(self.arguments(results)))


def rows_of(results: Path) -> list[dict[str, Any]]:
    """What a results file says, without times. It raises where the file is not whole."""
    if results.suffix == ".json":
        rows: list[dict[str, Any]] = json.loads(results.read_text())["rows"]
    else:
        with results.open(newline="") as file:
            rows = [*csv.DictReader(file)]
    if len(rows) != 2:
        raise UnsoundError(f"{results.name} has {len(rows)} rows")
    return [{key: value for key, value in row.items() if key not in _TIMES} for row in rows]


def crash(evaluation: Evaluation, kills: int, seed: int) -> Found:
    """Kills an evaluation, again and again.

    Raises:
        UnsoundError: A file is half-written, says less than before, or says something else at the end.
    """
    draw, found = random.Random(seed), Found()
    expected: dict[str, list[dict[str, Any]]] = {}
    start = time.monotonic()
    for suffix in (".json", ".csv"):
        whole = evaluation.folder / f"whole{suffix}"
        _end(evaluation.started(whole))
        expected[suffix] = rows_of(whole)
    seconds = (time.monotonic() - start) / 2
    while kills:
        results = evaluation.folder / "crashing" / f"run{found.runs}{draw.choice(['.json', '.csv'])}"
        kills = _killed(evaluation, results, kills, seconds, draw, found)
        if rows_of(results) != expected[results.suffix]:
            raise UnsoundError(f"{results.name} says {rows_of(results)}, where a run that nobody killed says {expected}")
        found.runs += 1
        found.litter += sum(path.name.startswith(f".{results.name}") for path in results.parent.iterdir())
    return found


def _killed(evaluation: Evaluation, results: Path, kills: int, seconds: float, draw: random.Random, found: Found) -> int:
    """Starts a run until it ends, and kills it on the way. Returns how many kills are left."""
    done = 0
    while True:
        found.continued += done > 0
        way = draw.choice(WAYS) if kills else ""
        code = _once(evaluation, results, way, draw, seconds)
        if code not in (0, -signal.SIGKILL):
            raise UnsoundError(f"a run of {results.name} ended with {code}")
        if code:
            kills -= 1
            found.kills[way] += 1
        before, done = done, _looked_at(results)
        if results.exists() and not part_of(results).exists():  # killed or not, it has done all
            return kills
        if done < before:
            raise UnsoundError(f"{part_of(results).name} says {done} samples, where it said {before}")


def _once(evaluation: Evaluation, results: Path, way: str, draw: random.Random, seconds: float) -> int:
    """One run, killed in one of `WAYS`, or not if there is none. Returns its exit code."""
    if way == "after a time":
        child = evaluation.started(results)
        time.sleep(draw.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    place = draw.randrange(1, 12)
    prepare = {"at a file": lambda: _die_at_a_file(results.parent, place), "half of a file": lambda: _die_in_a_file(place)}
    return _end(evaluation.started(results, prepare.get(way, lambda: None)))


def _end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _die_at_a_file(folder: Path, place: int) -> None:
    """This process kills itself when it is about to touch a file of a folder, some time."""
    left = [place]

    def hear(event: str, given: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove") and str(given[0]).startswith(str(folder)):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hear)


def _die_in_a_file(place: int) -> None:
    """This process kills itself when it has written half of a file, some time."""
    left, whole = [place], Path.write_bytes

    def write_half(self: Path, data: bytes) -> int:
        left[0] -= 1
        if left[0]:
            return whole(self, data)
        whole(self, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    Path.write_bytes = write_half  # type: ignore[method-assign]


def _looked_at(results: Path) -> int:
    """How far a run says that it has come; all files are whole, or not there."""
    part = part_of(results)
    if results.exists():
        rows_of(results)
    return int(json.loads(part.read_text())["progress"]["done"]) if part.exists() else 0


def table(row: Mapping[str, Any]) -> str:
    """What was seen, as Markdown."""
    kills: Mapping[str, int] = row["kills"]
    lines: Sequence[tuple[str, object]] = [
        ("killed", sum(kills.values())),
        *((f"... {way}", count) for way, count in kills.items()),
        ("runs that came to their end", row["runs"]),
        ("... with other counts than a run that nobody killed", 0),
        ("runs that went on where another had come to", row["continued"]),
        ("results or part files that were not whole", 0),
        ("temporary files that were left", row["litter"]),
    ]
    return tabulate(lines, headers=["", "count"], tablefmt="github")


def main() -> None:
    """Runs, prints the table and writes the JSON file; or prints the table of a file that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/crashes.json"))
    parser.add_argument("--table", action="store_true", help="run nothing: print the table of --out")
    arguments = parser.parse_args()
    if not arguments.table:
        with tempfile.TemporaryDirectory() as folder:
            found = crash(Evaluation(Path(folder)), arguments.kills, arguments.seed)
        write(arguments.out, [{**vars(found), "kills": dict(found.kills)}], seed=arguments.seed)
    print(table(json.loads(arguments.out.read_text())["rows"][0]))


if __name__ == "__main__":
    main()
