"""A member's process, as the process that started it sees it: messages, time limit, and being stopped for a while."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

from .jobs import Job
from .member import serve


class MemberError(Exception):
    """A member said that it failed, died, or took too long."""


@dataclass
class Child:
    """The process of a job.

    Attributes:
        job: What it does.
        process: The process, at the head of its own group.
        connection: The pipe to it.
        deadline: When its time is over, by `time.monotonic`.
        limit: Seconds that it had.
        facts: What it said when it was ready; None before.
        rows: Results of a check.
        fault: Why it failed; empty if it did not.
        ended: Whether it is done.
    """

    job: Job
    process: BaseProcess
    connection: Connection
    deadline: float
    limit: float
    facts: dict[str, Any] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    fault: str = ""
    ended: bool = False

    @classmethod
    def start(cls, context: BaseContext, job: Job, limit: float, log: Path) -> Child:
        """Starts the process."""
        here, there = context.Pipe()
        process = cast(Any, context).Process(target=serve, args=(there, job, log), name=f"{job.subject} {job.what}")
        process.start()
        there.close()
        return cls(job, process, here, time.monotonic() + limit, limit)

    @property
    def working(self) -> bool:
        """Whether it takes a processor: it does not once it waits for its turn."""
        return not self.ended and self.facts is None

    @property
    def ready(self) -> bool:
        """Whether it waits for its turn."""
        return not self.ended and self.facts is not None

    def take(self) -> str:
        """Takes one message; returns its word. A failure ends the child."""
        try:
            word, value = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5)
            self.fail(f"the process died with exit code {self.process.exitcode}")
            return "error"
        if word == "ready":
            self.facts = value
        elif word == "row":
            self.rows.append(value)
        elif word == "error":
            self.fail("\n".join(value))
        elif word == "end":
            self.end()
        return word

    def check_time(self) -> None:
        """Ends it if its time is over."""
        if self.working and time.monotonic() > self.deadline:
            self.fail(f"timed out after {self.limit:.0f} s")

    def ask(self, word: str, number: int = 0, *, seconds: float) -> Any:
        """Sends a request and waits for the answer.

        Raises:
            MemberError: It failed, or did not answer in time.
        """
        try:
            self.connection.send((word, number))
            if self.connection.poll(seconds):
                answer, value = self.connection.recv()
                if answer != "error":
                    return value
                self.fail("\n".join(value))
            else:
                self.fail(f"did not answer {word!r} within {seconds:.0f} s")
        except (EOFError, OSError):
            self.fail(f"the process died when it was asked for {word!r}")
        raise MemberError(self.fault)

    def fail(self, why: str) -> None:
        """Notes a failure and ends the process."""
        self.fault = why
        self.end()

    def end(self) -> None:
        """Ends the process and those that it started."""
        if not self.ended:
            self.ended = True
            self._signal(signal.SIGKILL)
            self.connection.close()
            self.process.join(5)

    def stop(self) -> None:
        """Stops it, so that it disturbs no measurement."""
        self._signal(signal.SIGSTOP)

    def go_on(self, seconds: float) -> None:
        """Lets it go on; the seconds for which it was stopped do not count."""
        self._signal(signal.SIGCONT)
        self.deadline += seconds

    def _signal(self, number: signal.Signals) -> None:
        pid = self.process.pid
        assert pid is not None
        with suppress(ProcessLookupError):
            os.kill(pid, number)  # it may not lead its group yet
        with suppress(ProcessLookupError):
            os.killpg(pid, number)
