"""One process: it does the job that it is given, and answers the process that started it.

What it sends: ("row", row) for each result of a check; ("ready", facts) once a variant is compiled and warm; ("times", [ms])
and ("kernels", rows) when asked; ("end", None); ("error", its last lines).
"""

from __future__ import annotations

import os
import statistics
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .correctness import check
from .device import Device
from .jobs import CORRECTNESS, Job
from .speed import build

_WARMUP = 4  # with CUDA graphs: compiled, warmed up, recorded, replayed once


def serve(connection: Connection, job: Job, log: Path) -> None:
    """Does `job`; all that it prints goes to `log`."""
    os.setpgrp()  # so that it is stopped together with the processes it starts
    with log.open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    try:
        device = Device(job.device)
        device.prepare()
        if job.part == CORRECTNESS:
            for row in check(job, device):
                connection.send(("row", row))
        else:
            _take_turns(connection, job, device)
        connection.send(("end", None))
    except Exception:  # it runs whole models; of a process that is killed the parent sees the end
        connection.send(("error", traceback.format_exc().strip().splitlines()[-12:]))
        raise


def _take_turns(connection: Connection, job: Job, device: Device) -> None:
    """Compiles and warms up, then times or profiles as asked, until told to stop."""
    start = time.monotonic()
    variant = build(job, device)
    built = time.monotonic()
    variant.call()
    device.synchronize()
    seconds = {"s to build": built - start, "s of first call": time.monotonic() - built}
    device.start_peak()  # what compiling took does not count
    for _ in range(_WARMUP - 1):
        variant.call()
    device.synchronize()
    peak = device.peak_megabytes()
    calls = device.calls_of(statistics.median(device.sample(variant.call, 1) for _ in range(3)))
    ms = device.sample(variant.call, calls)
    device.free_memory()
    facts = {"macs": variant.macs, "dense_macs": variant.dense_macs, "MB": peak, "dropped": device.dropped_graphs(), **seconds}
    connection.send(("ready", {**facts, "turn_ms": ms * calls}))
    while True:
        word, number = connection.recv()
        answer: Any = None
        if word == "turn":
            variant.call()
            answer = ("times", [device.sample(variant.call, calls) for _ in range(number)])
        elif word == "kernels":
            answer = ("kernels", device.dearest_kernels(variant.call))
        else:
            return
        connection.send(answer)
