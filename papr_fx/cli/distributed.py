"""Starts an evaluation on one process, or as one of several that torchrun started."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ..errors import ArgumentError
from ..evaluation.counts import Progress
from ..evaluation.results import check_writable


@contextmanager
def started(arguments: argparse.Namespace) -> Generator[torch.device]:
    """Checks the files to write, sets threads and seed, and joins the other processes; yields this process's device."""
    for name, suffixes in (("results_file", (".csv", ".json")), ("plot", (".png",))):
        if path := vars(arguments).get(name):
            check_writable(path, suffixes)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        device = _joined(arguments.device)
        torch.manual_seed(arguments.seed)
        yield device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def check_cuda(device: str) -> None:
    """Refuses a CUDA device if there is none."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ArgumentError("--device cuda: no CUDA device is available")


def process_count() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the one process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def from_first(read: Callable[[], Progress | None]) -> Progress | None:
    """Returns on every process what the first one reads: files may differ between machines, or change in between.

    Raises:
        ArgumentError: The first process raised it; then every process does.
    """
    if not dist.is_initialized():
        return read()
    shared: list[Any] = [None]
    if is_first():
        try:
            shared = [read()]
        except ArgumentError as error:
            shared = [error]
    dist.broadcast_object_list(shared)
    if isinstance(shared[0], ArgumentError):
        raise shared[0]
    return shared[0]


def _joined(name: str) -> torch.device:
    """Joins the process group, if there is one; returns this process's device."""
    kind = name or ("cuda" if torch.cuda.is_available() else "cpu")
    check_cuda(kind)
    if process_count() > 1:
        try:
            dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo")
        except (ValueError, RuntimeError) as error:
            raise ArgumentError(
                f"WORLD_SIZE is set, but the processes cannot join (start them with torchrun): {error}"
            ) from error
        kind = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if kind == "cuda" else kind
    return checked_device(kind)


def checked_device(name: str) -> torch.device:
    """The device of a name, made the current one if it is a CUDA device with a number.

    Raises:
        ArgumentError: There is no such device.
    """
    check_cuda(name)
    try:
        if name.startswith("cuda:"):
            torch.cuda.set_device(name)
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"--device {name}: {error}") from error
