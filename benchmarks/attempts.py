"""Reads a file in a process of its own, with little memory and time; says what came of it. Linux only."""

import faulthandler
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from papr_fx import PaprError

SOUND = ("read", "reported", "refused")
_ADDRESSES = 16 << 30  # bytes: what asks for more gets a `MemoryError`


@dataclass(frozen=True)
class Attempt:
    """What came of reading a file.

    Attributes:
        outcome: "read"; "reported", where a sample is named as unreadable; "refused", by a `PaprError`; and what must not be:
            "other" exception, "hang", "crash" of the process, too much "memory", code in the file was "executed".
        message: What was said, or where it failed.
        seconds: How long it took.
        megabytes: How much more memory was in use at the most.
    """

    outcome: str
    message: str
    seconds: float
    megabytes: float


def attempt(read: Callable[[], str], seconds: float, megabytes: float) -> Attempt:
    """Calls `read` in a forked process.

    Args:
        read: Returns what came of it, or raises.
        seconds: When it counts as hanging.
        megabytes: How much more memory it may use.
    """
    source, sink = os.pipe()
    sys.stdout.flush()
    start = time.monotonic()
    child = os.fork()
    if not child:
        os.close(source)
        _child(read, sink)
    os.close(sink)
    said = _received(source, start + seconds)
    os.close(source)
    took = time.monotonic() - start
    if said is None:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if said is None:
        return Attempt("hang", f"no end after {seconds:g} s", took, 0.0)
    if not said:
        return Attempt("crash", f"status {status}", took, 0.0)
    outcome, message, used = json.loads(said)
    if outcome in SOUND and used > megabytes:
        outcome = "memory"
    return Attempt(outcome, message, took, used)


def _received(source: int, end: float) -> bytes | None:
    """What the child wrote until it closed the pipe; None if it did not in time."""
    said = b""
    while True:
        ready, _, _ = select.select([source], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return None
        part = os.read(source, 1 << 16)
        if not part:
            return said
        said += part


def _child(read: Callable[[], str], sink: int) -> NoReturn:
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    warnings.simplefilter("ignore")
    faulthandler.disable()
    before = _status("VmRSS")
    limit = 1024 * _status("VmSize") + _ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    outcome, message = _tried(read)
    used = (_status("VmHWM") - before) / 1000
    os.write(sink, json.dumps([outcome, message[:2000], used]).encode())
    os._exit(0)


def _tried(read: Callable[[], str]) -> tuple[str, str]:
    try:
        return read(), ""
    except PaprError as error:
        return "refused", str(error)
    except MemoryError as error:
        return "memory", _place(error)
    except BaseException as error:  # whatever it is, it must not be
        return "other", _place(error)


def _place(error: BaseException) -> str:
    """An exception, and the last lines of papr-fx and of all that it was raised in."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}papr_fx{os.sep}" in frame.filename]
    where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in [*own[-1:], *frames[-1:]]]
    return f"{type(error).__name__}: {str(error)[:300]} ({' > '.join(where)})"


def _status(key: str) -> int:
    """A line of /proc/self/status, in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise AssertionError(key)
