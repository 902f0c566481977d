"""Processes of their own for what a test does to a process: it is killed, or is one of several that work together.

They are forked from a server that has imported the command line, once for all tests of a worker.
"""

import contextlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import torch


def run_processes(call: Callable[..., object], *given: object, folder: Path, count: int = 1) -> list[int | None]:
    """Calls `call(*given)` in new processes, with what torchrun says to each of several. Returns their exit codes.

    What they print is written to `out0.txt`, ... in `folder`, which is their working directory.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["papr_fx.cli.main"])
    environment = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())} if count > 1 else {}
    processes = [context.Process(target=_run, args=(call, given, folder, rank, environment)) for rank in range(count)]
    for process in processes:
        process.start()
    running = list(processes)
    while running:
        wait([process.sentinel for process in running], timeout=300)
        ended = [process for process in running if process.exitcode is not None]
        if not ended or any(process.exitcode for process in ended):  # the others would wait for it
            for process in running:
                process.kill()
        for process in ended:
            running.remove(process)
    return [process.exitcode for process in processes]


def _run(call: Callable[..., object], given: tuple[object, ...], folder: Path, rank: int, environment: dict[str, str]) -> None:
    if environment:
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    os.chdir(folder)
    torch.set_num_threads(1)
    with (folder / f"out{rank}.txt").open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = call(*given)
    sys.exit(code if isinstance(code, int) else 0)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
