"""A server's life: threads that serve small pruned models while others change them. `python -m benchmarks.long_run`.

Each process holds a ViT, a ConvNeXt and a Swin. Its threads take turns at random: they serve batches of several sizes; change
the keep ratio of a module that others serve; save its weights, load them into a new model, transform it anew and put it in the
place of the old one; and train and serve a copy of their own. Every answer is compared with the one that a single thread
computed at the start, at each keep ratio that was in force during the call. The first wrong answer ends the run.

Answers should be equal to the bit; those that differ by rounding are counted. Memory is looked at while all threads rest.
"""

import argparse
import copy
import io
import json
import multiprocessing
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from tabulate import tabulate
from torch import Tensor, nn

from .answers import MODELS, PROPOSAL, RATIOS, SIZES, STARTS, Known, Question, WrongAnswerError, lively
from .memory import Sample, sample
from .record import environment, write
from .served import Gate, Served


@dataclass(frozen=True)
class Settings:
    """How a life goes.

    Attributes:
        seconds: How long, after the answers are known.
        threads: Threads that work.
        every: Seconds between two looks at memory.
        warm: Seconds until the first look.
        seed: What is chosen at random.
    """

    seconds: float
    threads: int = 8
    every: float = 60.0
    warm: float = 300.0
    seed: int = 0


@dataclass
class Life:
    """A process that serves: what is known, what is served, and what was done."""

    known: Mapping[str, Known]
    served: dict[str, Served]
    counts: Counter[str] = field(default_factory=Counter[str])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def begin(cls) -> "Life":
        """Models of this process, transformed, with their answers."""
        proposal = lively(timm.create_model(PROPOSAL)).eval()
        known = {name: Known(name, proposal) for name in MODELS}
        life = cls(known, {})
        for name, case in known.items():
            life.served[name] = Served(case.transformed(life.loaded(name, case.weights), 0.5, verify=True))
        return life

    def loaded(self, name: str, weights: Mapping[str, Tensor]) -> nn.Module:
        """A new model with these weights."""
        model = MODELS[name]().eval()
        model.load_state_dict(weights)
        return model

    def done(self, **what: int) -> None:
        """Counts."""
        with self._lock:
            self.counts.update(what)

    def asked(self, name: str, served: Served, question: Question) -> None:
        """Asks a served module, and checks its answer."""
        case = self.known[name]
        with served.called() as ratios:
            out = case.answer(served.gm, question)
        exact = case.check(out, question, ratios)
        self.done(answers=1, exact=exact, images=question.size, **{"under change": len(ratios) > 1})


def serves(life: Life, name: str, draw: random.Random) -> None:
    """Batches, one after the other."""
    for _ in range(20):
        life.asked(name, life.served[name], Question(draw.choice(STARTS), draw.choice(SIZES)))


def changes(life: Life, name: str, draw: random.Random) -> None:
    """Another keep ratio, while others serve."""
    life.served[name].retarget(draw.choice(RATIOS))
    life.done(changes=1)


def reloads(life: Life, name: str, draw: random.Random) -> None:
    """The weights go to a file and into a new model, which is transformed, and serves from now on."""
    file = io.BytesIO()
    torch.save(life.served[name].gm.state_dict(), file)
    file.seek(0)
    model = life.loaded(name, torch.load(file, weights_only=True))
    verify = draw.random() < 0.2
    fresh = Served(life.known[name].transformed(model, draw.choice(RATIOS), verify=verify))
    life.asked(name, fresh, Question(draw.choice(STARTS), draw.choice(SIZES)))
    life.served[name] = fresh
    life.done(reloads=1)


def trains(life: Life, name: str, draw: random.Random) -> None:
    """A copy of its own: in training mode, at another ratio, and back."""
    served = life.served[name]
    with served.called() as ratios:
        gm = copy.deepcopy(served.gm)
    if gm.plan.z not in ratios:
        raise WrongAnswerError(f"{name}: a copy has the keep ratio {gm.plan.z}, where {ratios} were in force")
    own = Served(gm)
    for _ in range(3):
        gm.train()
        life.asked(name, own, Question(draw.choice(STARTS), draw.choice(SIZES), training=True))
        gm.zero_grad()
        own.retarget(draw.choice(RATIOS))
        gm.eval()
        life.asked(name, own, Question(draw.choice(STARTS), draw.choice(SIZES)))
    life.done(copies=1)


Work = Callable[[Life, str, random.Random], None]
WORKS: dict[Work, int] = {serves: 60, changes: 60, trains: 5, reloads: 4}  # and how often


def live(settings: Settings, stop: Any = None) -> dict[str, Any]:
    """One process's life: what was done, and what it held after the warm-up and at the end.

    Args:
        settings: How it goes.
        stop: An event that ends it early. It is set when an answer is wrong.

    Raises:
        WrongAnswerError: An answer is wrong.
    """
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    stop = stop or threading.Event()
    life, gate, start = Life.begin(), Gate(), time.monotonic()

    def work(number: int) -> None:
        draw = random.Random(1000 * settings.seed + number)
        with ExitStack() as failing:
            failing.callback(stop.set)  # for the other threads
            while time.monotonic() < start + settings.seconds and not stop.is_set():
                with gate.working():
                    (what,) = draw.choices([*WORKS], [*WORKS.values()])
                    what(life, draw.choice([*MODELS]), draw)
            failing.pop_all()

    with ThreadPoolExecutor(settings.threads) as pool:
        workers = [pool.submit(work, number) for number in range(settings.threads)]
        samples = _watched(settings, gate, stop, start)
        for worker in workers:
            worker.result()
        samples.append(sample((time.monotonic() - start) / 60))  # while the threads are there, as for the others
    return _row(life, samples, settings)


def _watched(settings: Settings, gate: Gate, stop: Any, start: float) -> list[Sample]:
    """What the process held from time to time, from the warm-up on."""
    samples: list[Sample] = []
    due = start + min(settings.warm, settings.seconds / 5)
    while due < start + settings.seconds and not stop.wait(max(0.0, due - time.monotonic())):
        with gate.quiet():
            samples.append(sample((time.monotonic() - start) / 60))
        due = time.monotonic() + settings.every
    return samples


def _row(life: Life, samples: list[Sample], settings: Settings) -> dict[str, Any]:
    first, last = samples[0], samples[-1]
    counts = life.counts
    return {
        "seed": settings.seed,
        "threads": settings.threads,
        "minutes": round(last.minutes, 2),
        **{word: counts[word] for word in ("answers", "images", "under change", "changes", "reloads", "copies")},
        "wrong": 0,
        "not to the bit": counts["answers"] - counts["exact"],
        "warm at": round(first.minutes, 2),
        "MB warm": round(first.megabytes, 1),
        "MB end": round(last.megabytes, 1),
        "growth %": round(100 * (last.megabytes / first.megabytes - 1), 2),
        "tensors": [first.tensors, last.tensors],
        "graph modules": [first.graph_modules, last.graph_modules],
        "sources": [first.sources, last.sources],
        "samples": [asdict(one) for one in samples],
    }


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as Markdown, without the single samples."""
    shown = [{key: _cell(value) for key, value in row.items() if key != "samples"} for row in rows]
    turned = [[key, *(row[key] for row in shown)] for key in shown[0]]
    return tabulate(turned, headers=["", *(f"process {number + 1}" for number in range(len(shown)))], tablefmt="github")


def _cell(value: object) -> object:
    return " -> ".join(map(str, value)) if isinstance(value, list) else value


_stopping: list[Any] = []  # the event of the processes of a run


def _begin(stop: Any) -> None:
    _stopping.append(stop)


def _live(settings: Settings) -> dict[str, Any]:
    (stop,) = _stopping
    with ExitStack() as failing:
        failing.callback(stop.set)  # for the other processes
        told = live(settings, stop)
        failing.pop_all()
    return told


def run(settings: list[Settings]) -> list[dict[str, Any]]:
    """Several lives, each in a process of its own; a single one in this one."""
    if len(settings) == 1:
        return [live(settings[0])]
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(len(settings), context, _begin, (stop,)) as pool:
        return list(pool.map(_live, settings))


def main() -> None:
    """Runs, prints the table and writes the JSON file; or prints the table of a file that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=8, help="of each process")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--warm", type=float, default=5.0, help="minutes until memory is first looked at, at most a fifth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/long_run.json"))
    parser.add_argument("--table", action="store_true", help="run nothing: print the table of --out")
    arguments = parser.parse_args()
    if not arguments.table:
        seconds, warm = 60 * arguments.minutes, 60 * arguments.warm
        seeds = range(arguments.seed, arguments.seed + arguments.processes)
        rows = run([Settings(seconds, arguments.threads, min(60.0, seconds / 10), warm, seed) for seed in seeds])
        write(arguments.out, rows, seed=arguments.seed)
        print(f"{environment(arguments.seed)}\n")
    print(table(json.loads(arguments.out.read_text())["rows"]))


if __name__ == "__main__":
    main()
