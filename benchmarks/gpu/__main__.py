"""`python -m benchmarks.gpu --out FOLDER`: measures until the budget is spent; a second run goes on where it stopped."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks.record import environment

from . import plan
from .estimates import beside, estimates
from .jobs import ESTIMATES, KERNELS, PARTS
from .pool import Pool, Settings
from .results import FILE, Results
from .summary import page


def main() -> None:
    """Measures, and writes gpu.json, summary.md and log.txt; exits with 1 if something failed or is not as it should be."""
    start = time.monotonic()
    arguments = _options().parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is here; --dry-run walks through everything with tiny models on the CPU")
    signal.signal(signal.SIGTERM, _exit)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the processes themselves are many
    results = Results.open(arguments.out, None if arguments.fresh else arguments.resume or arguments.out / FILE)
    wanted = [part for part in arguments.parts if part not in arguments.skip]
    tasks = results.to_do([task for task in (plan.tiny() if arguments.dry_run else plan.whole()) if task.part in wanted])
    settings = Settings(
        arguments.slots or max(2, (os.cpu_count() or 2) - 2),
        start + arguments.budget,
        results.log,
        context="forkserver" if arguments.dry_run else "spawn",
        near=0.0 if KERNELS not in wanted else math.inf if arguments.dry_run else Settings.near,
        rounds=1 if arguments.dry_run else Settings.rounds,
    )
    results.say(f"{len(tasks)} tasks, {settings.slots} processes, {arguments.budget:.0f} s")
    results.left = [task.name for task in Pool(settings, results.tell, results.fail, results.complete).run(tasks)]
    if ESTIMATES in wanted:
        results.rows = [row for row in results.rows if row["part"] != ESTIMATES]
        batch = plan.TINY_BATCH if arguments.dry_run else plan.BATCH
        found = beside(results.rows, estimates(arguments.estimates), batch)
        results.rows += [{"task": ESTIMATES, "part": ESTIMATES, **row} for row in found]
    results.write()
    text = page(results, environment(0))
    (arguments.out / "summary.md").write_text(text)
    results.say(
        f"{time.monotonic() - start:.0f} s; {len(results.errors)} failures, {len(results.wrong)} rows not as they should be"
    )
    print(text)
    if results.errors or results.wrong:
        raise SystemExit(1)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of gpu.json, summary.md and log.txt")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--skip", nargs="+", choices=PARTS, default=[])
    parser.add_argument("--budget", type=float, default=480, help="seconds for all of it")
    parser.add_argument("--slots", type=int, help="processes that compile at a time; default: processors less two")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on from this gpu.json; default: the one in --out")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run found")
    parser.add_argument(
        "--estimates", type=Path, help="a file of benchmarks.cuda_lowering; default: the table in docs/speed.md"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU")
    return parser


def _exit(*_: object) -> NoReturn:
    sys.exit("terminated")  # so that the processes are ended


if __name__ == "__main__":
    main()
