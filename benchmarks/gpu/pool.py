"""Runs tasks: many processes compile at once, and the variants of one task are timed while all others are stopped."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from .child import Child, MemberError
from .jobs import KERNELS, Task
from .speed import DENSE

Row = dict[str, Any]
_ROUNDS, _LEAST_ROUNDS, _SAMPLES = 7, 3, 2
_SECONDS_OF_TURNS = 2.5  # for all rounds of one task
_LAST = 20.0  # seconds before the end, in which what is ready is still timed


@dataclass(frozen=True)
class Settings:
    """How a run goes.

    Attributes:
        slots: Processes that work at a time.
        end: When it must be over, by `time.monotonic`.
        log: File for what the processes print.
        context: How processes are started: "spawn", or "forkserver" (quicker, but CUDA may not bear it).
        near: Kernels are recorded where a speed-up is below this share of the MAC ratio; at 0 nowhere.
        rounds: Turns of each variant.
    """

    slots: int
    end: float
    log: Path
    context: str = "spawn"
    near: float = 0.9
    rounds: int = _ROUNDS


@dataclass
class Started:
    """A task whose processes are being started, in order."""

    task: Task
    waiting: deque[Any]
    children: list[Child] = field(default_factory=list[Child])
    told: int = 0

    @classmethod
    def of(cls, task: Task) -> Started:
        """None of its processes is started."""
        return cls(task, deque(task.jobs))

    @property
    def settled(self) -> bool:
        """Whether no process of it works any more."""
        return not self.waiting and not any(child.working for child in self.children)

    def close(self) -> None:
        """Ends what is left of it."""
        for child in self.children:
            child.end()


class Pool:
    """Runs tasks in order; `tell` gets each row, `fail` the name of what failed and why, `done` each task that is complete."""

    def __init__(
        self,
        settings: Settings,
        tell: Callable[[Task, Row], None],
        fail: Callable[[Task, str, str], None],
        done: Callable[[Task], None],
    ) -> None:
        """Starts nothing yet."""
        self._settings, self._tell, self._fail, self._done = settings, tell, fail, done
        self._context = multiprocessing.get_context(settings.context)
        if settings.context == "forkserver":
            self._context.set_forkserver_preload(["benchmarks.gpu.member"])
        self._active: list[Started] = []

    def run(self, tasks: Sequence[Task]) -> list[Task]:
        """Runs tasks until the time is over; returns those of which nothing was told, for want of time."""
        waiting = deque(Started.of(task) for task in tasks)
        try:
            while (waiting or self._active) and time.monotonic() < self._settings.end - _LAST:
                self._start(waiting)
                self._listen()
                for started in [s for s in self._active if s.settled]:
                    self._finish(started)
            return [*self._cut_off(), *(started.task for started in waiting)]
        finally:
            for started in self._active:
                started.close()

    @property
    def _children(self) -> list[Child]:
        return [child for started in self._active for child in started.children if not child.ended]

    def _start(self, waiting: deque[Started]) -> None:
        """Starts processes while there are slots, in the order of the tasks. Those that wait for their turn hold memory."""
        while (working := sum(child.working for child in self._children)) < self._settings.slots:
            if working and len(self._children) >= 3 * self._settings.slots // 2:
                return
            if not any(started.waiting for started in self._active):
                if not waiting:
                    return
                self._active.append(waiting.popleft())
            started = next(s for s in self._active if s.waiting)
            left = self._settings.end - time.monotonic()
            limit = min(started.task.limit, left)
            started.children.append(Child.start(self._context, started.waiting.popleft(), limit, self._settings.log))

    def _listen(self) -> None:
        """Waits for messages, and tells rows of checks at once."""
        children = {child.connection: child for child in self._children if child.working}
        for connection in wait(list(children), timeout=0.5):
            children[cast(Connection, connection)].take()
        for child in children.values():
            child.check_time()
        for started in self._active:
            self._tell_checks(started)

    def _tell_checks(self, started: Started) -> None:
        rows = [row for child in started.children for row in child.rows]
        for row in rows[started.told :]:
            self._tell(started.task, row)
        started.told = len(rows)

    def _finish(self, started: Started) -> None:
        """Times the variants that are ready, and tells what failed."""
        self._tell_checks(started)
        if started.task.timed and any(c.ready and c.job.what == DENSE for c in started.children):
            self._measure(started)
        self._tell_faults(started)
        if not any(child.fault for child in started.children):
            self._done(started.task)
        started.close()
        self._active.remove(started)

    def _cut_off(self) -> list[Task]:
        """Times what is ready of tasks that are not; returns those of which nothing is."""
        nothing: list[Task] = []
        for started in list(self._active):
            ready = [child.job.what for child in started.children if child.ready]
            if started.task.timed and DENSE in ready and len(ready) > 1 and time.monotonic() < self._settings.end - 5:
                for child in started.children:
                    if child.working:
                        child.fail("not ready when the time was over")
                self._finish(started)
            elif not started.told:
                self._tell_faults(started)
                nothing.append(started.task)
        return nothing

    def _tell_faults(self, started: Started) -> None:
        for child in started.children:
            if child.fault:
                self._fail(started.task, child.job.what, child.fault)

    @contextmanager
    def _alone(self, members: Sequence[Child]) -> Generator[None]:
        """Stops all other processes for a while."""
        others = [child for child in self._children if child not in members]
        start = time.monotonic()
        for child in others:
            child.stop()
        if others:
            time.sleep(0.5)  # what they launched runs to its end
        try:
            yield
        finally:
            for child in others:
                child.go_on(time.monotonic() - start)

    def _measure(self, started: Started) -> None:
        """Lets the variants that are ready take turns, and tells one row for each."""
        members = [child for child in started.children if child.ready]
        turns = sum(cast(dict[str, Any], child.facts)["turn_ms"] for child in members) * (_SAMPLES + 1) / 1e3
        rounds = min(self._settings.rounds, max(_LEAST_ROUNDS, int(_SECONDS_OF_TURNS / max(turns, 1e-6))))
        times: dict[str, list[float]] = {child.job.what: [] for child in members}
        with self._alone(members):
            for number in range(rounds + 1):  # the first warms the clocks up
                for child in [c for c in members if c.ready]:
                    try:
                        values = child.ask("turn", _SAMPLES, seconds=60)
                    except MemberError:
                        continue
                    times[child.job.what] += values if number else []
        for child in [c for c in members if c.ready]:
            self._tell(started.task, _row(child, times, members))
        self._record_kernels(started, times, members)

    def _record_kernels(self, started: Started, times: dict[str, list[float]], members: Sequence[Child]) -> None:
        """The dearest kernels of the dense model and of the variant that falls most short of its MAC ratio."""
        short = [(c, _row(c, times, members)) for c in members if c.ready and cast(dict[str, Any], c.facts)["macs"]]
        short = [
            (child, row["of it"]) for child, row in short if row["of it"] is not None and row["of it"] < self._settings.near
        ]
        if not short or started.task.jobs[0].batch < 2:
            return
        worst = min(short, key=lambda pair: pair[1])[0]
        for child in (next(c for c in members if c.job.what == DENSE), worst):
            if not child.ready:
                continue
            try:
                found = child.ask("kernels", seconds=40)
            except MemberError:
                continue
            row = {"subject": child.job.subject, "variant": child.job.what, "run": child.job.mode, "batch": child.job.batch}
            self._tell(started.task, {**row, "part": KERNELS, "kernels": found})


def _row(child: Child, times: dict[str, list[float]], members: Sequence[Child]) -> Row:
    """The result of one variant: medians, beside the faster of the dense variants."""
    job, facts = child.job, cast(dict[str, Any], child.facts)
    ms = statistics.median(times[job.what])
    dense = min(statistics.median(values) for what, values in times.items() if what.startswith(DENSE) and values)
    dense_macs = max(cast(dict[str, Any], c.facts)["dense_macs"] for c in members)
    ratio = dense_macs / facts["macs"] if facts["macs"] else None
    return {
        "subject": job.subject,
        "variant": job.what,
        "run": job.mode,
        "batch": job.batch,
        "ms": ms,
        "ms range": (min(times[job.what]), max(times[job.what])),
        "images/s": 1e3 * job.batch / ms,
        "speed-up": dense / ms,
        "GMACs": (facts["macs"] or dense_macs) / 1e9,
        "MAC ratio": ratio,
        "of it": dense / ms / ratio if ratio else None,
        "MB": facts["MB"],
        "s to build": facts["s to build"],
        "s of first call": facts["s of first call"],
        "CUDA graphs dropped": facts["dropped"],
        "samples": len(times[job.what]),
        "ok": not facts["dropped"],
    }
