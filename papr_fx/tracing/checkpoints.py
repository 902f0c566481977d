"""Gradient checkpointing: calls of `torch.utils.checkpoint` while a model is traced.

A traced call would dissolve in the graph, and with it the memory that it saves. So its function is traced as any other code,
and its nodes keep in `meta` the regions that they lie in. Code that is made of the graph calls each region as one function
through `checkpoint` again, see `papr_fx.planning.checkpointing`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.utils import checkpoint

_CALL = "_checkpoint_impl"  # what `checkpoint` calls, also as a decorator, wherever code has imported it to


@dataclass(frozen=True)
class Region:
    """One call of `checkpoint`.

    Attributes:
        number: Which one, in the order of the calls.
        options: Its options that differ from their defaults. `use_reentrant` is none of them: regions are not re-entrant, which
            gives the same values and gradients, and gives them too where no input of a region needs a gradient.
    """

    number: int
    options: tuple[tuple[str, Any], ...] = ()


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
        """While active, what a traced call of `checkpoint` records is in a region. Other code is checkpointed as ever."""
        original = getattr(checkpoint, _CALL)
        defaults = {name: p.default for name, p in inspect.signature(original).parameters.items()}

        def call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], **options: Any) -> Any:
            if not self._is_recorded():
                return original(function, args, kwargs, **options)
            given = {name: value for name, value in options.items() if value is not defaults[name] and name != "use_reentrant"}
            with self._region(given):
                return function(*args, **kwargs)

        setattr(checkpoint, _CALL, call)
        try:
            yield
        finally:
            setattr(checkpoint, _CALL, original)

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
