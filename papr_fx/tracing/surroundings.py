"""What surrounds a trace: global settings of torch, shared with other threads, and contexts of the caller."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager

import torch


class SharedSetting:
    """A global setting that holds while any thread is inside. The last one to leave restores it.

    Otherwise two threads that overlap would restore each other's setting, and leave it behind.

    Args:
        apply: Makes the setting, and returns what undoes it.
    """

    def __init__(self, apply: Callable[[], Callable[[], None]]) -> None:
        self._apply = apply
        self._lock = threading.Lock()
        self._inside = 0
        self._undo: Callable[[], None] | None = None

    @contextmanager
    def __call__(self) -> Generator[None]:
        """Holds the setting."""
        with self._lock:
            if not self._inside:
                self._undo = self._apply()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside and self._undo is not None:
                    self._undo()


def _no_collection() -> Callable[[], None]:
    enabled = gc.isenabled()
    gc.disable()
    return gc.enable if enabled else lambda: None


# Python looks for cycles as objects are made, and graphs and their values are many small ones: a sixth of the time.
no_collection = SharedSetting(_no_collection)


@contextmanager
def without_log(name: str) -> Generator[None]:
    """Drops what this thread logs under that name."""
    thread = threading.get_ident()

    def is_other(record: logging.LogRecord) -> bool:
        return record.thread != thread

    log = logging.getLogger(name)
    log.addFilter(is_other)
    try:
        yield
    finally:
        log.removeFilter(is_other)


@contextmanager
def plain_contexts(device: torch.device) -> Generator[None]:
    """No autocast and no inference mode of the caller, and `device` as the default: a model is planned alike everywhere.

    Of a model on the meta device only shapes are known, but probes need values: for it the CPU is the default.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in dict.fromkeys(("cpu", "cuda", device.type)):
            if kind != "meta":
                stack.enter_context(torch.autocast(kind, enabled=False))
        default = torch.device("cpu") if device.type == "meta" else device
        if torch.get_default_device() != default:  # such a context slows every call of torch
            stack.enter_context(default)
        yield
