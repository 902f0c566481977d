"""Random models against oracles: `python -m benchmarks.random_models --count 10000 --seed 0`."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from .draw import draw
from .judge import judge
from .judged import judged
from .records import append, read, table
from .shrink import as_code, shrink

FAULTS = ("finding", "broken", "needless")


def run(numbers: Iterable[int], out: Path, workers: int) -> None:
    """Judges the models of these numbers that the record does not hold yet."""
    known = {line["number"] for line in read(out)}
    left = [number for number in numbers if number not in known]
    if workers == 1:
        for number in tqdm(left, unit="model", mininterval=5):
            append(out, judged(number))
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for line in tqdm(pool.imap_unordered(judged, left), total=len(left), unit="model", mininterval=5):
            append(out, line)


def replay(number: int, *, smaller: bool) -> None:
    """Prints what one model is and what became of it, and the smallest one that fails alike."""
    spec = draw(number)
    result = judge(spec)
    print(f"{spec}\n{result}")
    if smaller and result.verdict in FAULTS:
        print(f"\n{as_code(shrink(spec, result))}")


def main() -> int:
    """Runs, replays or prints the table. Fails where there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="how many models")
    parser.add_argument("--seed", type=int, default=0, help="number of the first model, in millions")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/random_models.json"), help="record, one line of JSON a model")
    parser.add_argument("--replay", type=int, help="number of one model")
    parser.add_argument("--shrink", action="store_true", help="make what fails as small as it can be")
    parser.add_argument("--table", action="store_true", help="print the table of the record")
    arguments = parser.parse_args()
    if arguments.replay is not None:
        replay(arguments.replay, smaller=arguments.shrink)
        return 0
    if not arguments.table:
        first = arguments.seed * 1_000_000
        run(range(first, first + arguments.count), arguments.out, arguments.workers)
    lines = read(arguments.out)
    print(table(lines))
    failed = [line for line in lines if line["verdict"] in FAULTS]
    for line in failed if arguments.shrink else ():
        replay(line["number"], smaller=True)
    return 1 if any(line["verdict"] in ("finding", "broken") for line in failed) else 0


if __name__ == "__main__":
    sys.exit(main())
