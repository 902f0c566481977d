"""A pruned module that threads share: which keep ratios a call may have run at; and a gate that lets all of them rest."""

import threading
from collections.abc import Generator
from contextlib import contextmanager

import papr_fx
from papr_fx.planning.module import PrunedModule


class Served:
    """A pruned module that threads share, and the keep ratios that a call of it may have run at."""

    def __init__(self, gm: PrunedModule) -> None:
        self.gm = gm
        self._lock = threading.Lock()
        self._ratios = {gm.plan.z}
        self._changing = 0
        self._calls: list[set[float]] = []

    @contextmanager
    def called(self) -> Generator[set[float]]:
        """The ratios in force at the start of a call. Those that are set meanwhile join them."""
        with self._lock:
            ratios = set(self._ratios)
            self._calls.append(ratios)
        try:
            yield ratios
        finally:
            with self._lock:
                self._calls = [call for call in self._calls if call is not ratios]

    def retarget(self, z: float) -> None:
        """Changes the keep ratio, whoever else serves or changes the module."""
        with self._lock:
            self._changing += 1
            for ratios in (self._ratios, *self._calls):
                ratios.add(z)
        papr_fx.set_keep_ratio(self.gm, z)
        with self._lock:
            self._changing -= 1
            if not self._changing:
                self._ratios = {self.gm.plan.z}


class Gate:
    """Lets work through, except while all is to be quiet."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._closed = False

    @contextmanager
    def working(self) -> Generator[None]:
        """A piece of work."""
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def quiet(self) -> Generator[None]:
        """No work is under way."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._inside)
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()
