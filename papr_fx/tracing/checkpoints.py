"""Gradient checkpointing: calls of `torch.utils.checkpoint` while a model is traced.

A traced call would dissolve in the graph, and with it the memory that it saves. So its function is traced as any other code,
and its nodes keep in `meta` the regions that they lie in. Code that is made of the graph calls each region as one function
through `checkpoint` again, see `papr_fx.planning.checkpointing`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..versions import CheckpointCall, redirect_checkpoint
from .own_names import original
from .surroundings import SharedSetting


@dataclass(frozen=True)
class Region:
    """One call of `checkpoint`.

    Attributes:
        number: Which one, in the order of the calls.
        options: Its options that differ from their defaults.
    """

    number: int
    options: tuple[tuple[str, Any], ...] = ()


_Args = tuple[Any, ...]
_Options = Mapping[str, Any]


class Checkpoints:
    """The calls of `checkpoint` in a model that is being traced.

    Args:
        is_recorded: Whether the code that runs now is being traced.
    """

    def __init__(self, is_recorded: Callable[[], bool]) -> None:
        self._is_recorded = is_recorded
        self._count = 0
        self._inside: tuple[Region, ...] = ()

    @contextmanager
    def watched(self) -> Generator[None]:
        """While active, what a traced call of `checkpoint` in this thread records is in a region."""
        before, _active.checkpoints = _active.checkpoints, self
        try:
            with _watching():
                yield
        finally:
            _active.checkpoints = before

    def call(
        self, plain: CheckpointCall, function: Callable[..., Any], args: _Args, kwargs: _Options, options: _Options
    ) -> Any:
        """A call of `checkpoint`: recorded in a region if it is traced, else `plain`."""
        if not self._is_recorded():
            return plain(function, args, kwargs, options)
        with self._region({name: original(value) for name, value in options.items()}):
            return function(*args, **kwargs)

    def mark(self, node: fx.Node) -> fx.Node:
        """Notes the regions that `node` is recorded in, and returns it."""
        return lay_inside(node, self._inside)

    @contextmanager
    def _region(self, options: Mapping[str, Any]) -> Generator[None]:
        outside = self._inside
        self._inside = (*outside, Region(self._count, tuple(options.items())))
        self._count += 1
        try:
            yield
        finally:
            self._inside = outside


def regions_of(node: fx.Node) -> tuple[Region, ...]:
    """The regions that a node lies in, from the outermost to the innermost."""
    return node.meta.get("checkpoints", ())


def lay_inside(node: fx.Node, regions: tuple[Region, ...]) -> fx.Node:
    """Notes that `node` lies in these regions, and returns it."""
    if regions:
        node.meta["checkpoints"] = regions
    return node


class _Active(threading.local):
    """What the calls of a thread go to."""

    checkpoints: Checkpoints | None = None


_active = _Active()


def _call(plain: CheckpointCall, function: Callable[..., Any], args: _Args, kwargs: _Options, options: _Options) -> Any:
    active = _active.checkpoints
    return active.call(plain, function, args, kwargs, options) if active else plain(function, args, kwargs, options)


_watching = SharedSetting(lambda: redirect_checkpoint(_call))
