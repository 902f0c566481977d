"""Who sees a fault: the proof of `transform` on one of the models, and the test suite. Each asks in a process of its own."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from tests.subjects import SUBJECTS, Subject

from .fault import ROOT, Fault
from .observe import Seen, transformed
from .plant import plant

_ALL = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-x", "--no-header", "--tb=no", "-W", "ignore"]


# What differs as soon as the module is there. All else is asked of it later: another mode or keep ratio, what it keeps.
AT_ONCE = frozenset({"output", "three images", "other size", "refusal"})


class Acting(NamedTuple):
    """A model on which a fault acts.

    Attributes:
        model: Its name.
        differs: In what.
        proof: What became of it with the proof: the class of the error, "healed" if the output is right after all, or "".
    """

    model: str
    differs: list[str]
    proof: str


def in_child(run: Callable[[], Any], seconds: float) -> Any:
    """The result of `run` in a forked process; None if that crashes or takes too long."""
    with tempfile.NamedTemporaryFile(suffix=".pickle") as file:
        child = os.fork()
        if not child:
            status = 1
            try:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 1)
                os.dup2(nowhere, 2)
                Path(file.name).write_bytes(pickle.dumps(run()))
                status = 0
            finally:
                os._exit(status)
        end = time.monotonic() + seconds
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return None
            time.sleep(0.05)
        data = Path(file.name).read_bytes()
        return pickle.loads(data) if data else None


class Known(NamedTuple):
    """What a model does without a fault.

    Attributes:
        seen: What was seen.
        by_proof: Whether only the proof refuses it: then nothing is known of a fault that the proof refuses there.
        functions: The functions that ran meanwhile, by file and first line.
        seconds: How long it took.
    """

    seen: Seen
    by_proof: bool
    functions: frozenset[tuple[str, int]]
    seconds: float


def reference(among: str) -> dict[str, Known]:
    """What the models whose names hold some text do without a fault, by name."""

    def run() -> dict[str, Known]:
        plant(None)
        return {subject.name: _known(subject) for subject in SUBJECTS if among in subject.name}

    return in_child(run, 1800)


def _known(subject: Subject) -> Known:
    functions: set[tuple[str, int]] = set()

    def note(frame: FrameType, *_: object) -> None:  # None: of the lines of the function nothing is told
        functions.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

    start = time.monotonic()
    sys.settrace(note)
    try:
        seen = transformed(subject, verify=True)
    finally:
        sys.settrace(None)
    by_proof = bool(seen.refused) and not transformed(subject, verify=False).refused
    own = {(os.path.relpath(os.path.realpath(file), ROOT), line) for file, line in functions if file.startswith(str(ROOT))}
    return Known(_without_module(seen), by_proof, frozenset(own), time.monotonic() - start)


def ask_proof(fault: Fault, known: Mapping[str, Known], seconds: float = 900) -> list[Acting] | None:
    """Models on which a fault acts, and what the proof says there, until it sees one; None if the process ended before.

    Models for which the faulty function does not run are left out. Those that are refused come first, then the quick ones.
    """
    place = fault.path, fault.function()
    runs = {name for name, found in known.items() if place[1] is None or place in found.functions}
    subjects = [subject for subject in SUBJECTS if subject.name in runs and not known[subject.name].by_proof]
    subjects.sort(key=lambda subject: (not known[subject.name].seen.refused, known[subject.name].seconds))

    def run() -> list[Acting]:
        plant(fault)
        found: list[Acting] = []
        for subject in subjects:
            acting = _acting(subject, known[subject.name].seen)
            found += [acting] if acting else []
            if any(acting.proof for acting in found):
                break
        return found

    return in_child(run, seconds)


def _acting(subject: Subject, right: Seen) -> Acting | None:
    differs = transformed(subject, verify=False).unlike(right)
    if not differs:
        return None
    proved = transformed(subject, verify=True)
    if proved.refused:
        return Acting(subject.name, differs, proved.refused)
    left = proved.unlike(right)
    healed = not left or (AT_ONCE & {*differs} and not AT_ONCE & {*left})
    return Acting(subject.name, differs, "healed" if healed else "")


def _without_module(seen: Seen) -> Seen:
    seen.module = None
    return seen


def tests_of(fault: Fault) -> list[list[str]]:
    """Test files that should see a fault, in groups: first the nearest."""
    stem, room = Path(fault.path).stem, fault.room
    own = [f"tests/{room}/test_{stem}.py"]
    beside = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / room).glob("test_*.py"))
    rest = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py"))
    groups = [[file for file in own if (ROOT / file).exists()], beside, rest]
    done: set[str] = set()
    for group in groups:
        group[:] = [file for file in dict.fromkeys(group) if file not in done and file not in _LEFT_OUT]
        done |= {*group}
    return [group for group in groups if group]


# They read sources, or start processes of their own, in which there is no fault.
_LEFT_OUT = {
    "tests/test_rooms.py",
    "tests/test_pages.py",
    "tests/test_wheel.py",
    "tests/test_docs.py",
    "tests/test_examples.py",
}


def ask_suite(fault: Fault | None, files: list[str], seconds: float = 1200) -> tuple[str, float] | None:
    """The first test that fails with a fault, "" if none does, and the seconds; None if the process ended before."""

    def run() -> tuple[str, float]:
        plant(fault)
        import pytest

        os.chdir(ROOT)
        first = _First()
        start = time.monotonic()
        code = pytest.main([*_ALL, *files], plugins=[first])
        name = first.failed or (f"pytest ended with {int(code)}" if code not in (0, 5) else "")
        return name, time.monotonic() - start

    return in_child(run, seconds)


class _First:
    """Notes the first test that fails."""

    failed = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = f"{report.nodeid} (not collected)"


def preload() -> None:
    """Imports what all processes need, once; not the package."""
    import hypothesis  # noqa: F401  # pyright: ignore[reportUnusedImport]
    import pytest  # noqa: F401  # pyright: ignore[reportUnusedImport]
    import torchvision  # noqa: F401  # pyright: ignore[reportUnusedImport]

    assert "papr_fx" not in sys.modules
