"""The code of a module: which class holds it, and how other code takes its place, while others hold or run the one before.

A thread that is inside the code finishes it. One that has found it, and is about to call it, calls what is in place.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple, cast

from torch import fx


class OwnLock:
    """A lock for what one object does with itself. A copy of the object has another."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnLock:
        return OwnLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnLock, ()


CALLS = ("__call__", "_wrapped_call")
WRITTEN = "_written"  # where a class holds its code, whatever others make its `forward`


def code_class(gm: fx.GraphModule) -> type[fx.GraphModule]:
    """The class that holds the code of one module. Others may put one of their own above it, as `fully_shard` does."""
    return next((kind for kind in type(gm).__mro__ if "_wrapped_call" in vars(kind)), type(gm))


class Compiled(NamedTuple):
    """A graph, and the Python code that `fx` made of it."""

    graph: fx.Graph
    code: str
    forward: FunctionType

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Compiled:
        """What is in place now."""
        return cls(gm.graph, gm._code, _same_code(vars(code_class(gm))[WRITTEN]))

    def restore(self, gm: fx.GraphModule) -> None:
        """Puts it in place again."""
        owner = code_class(gm)
        gm._graph = self.graph
        gm._code = self.code
        put(owner, _same_code(self.forward), forward_of_others(owner))


def _same_code(function: Callable[..., Any]) -> FunctionType:
    """Another function with the same code object, for which `torch.compile` finds what it compiled."""
    known = cast(FunctionType, function)
    same = FunctionType(known.__code__, known.__globals__, known.__name__, known.__defaults__)
    same.__kwdefaults__ = known.__kwdefaults__
    return same


def forward_of_others(owner: type[fx.GraphModule]) -> Callable[..., Any] | None:
    """The `forward` that others put on the class instead of its code, as `accelerate` does: it holds that code."""
    current = vars(owner).get("forward")
    return None if current is vars(owner).get(WRITTEN) else current


def put(owner: type[fx.GraphModule], written: FunctionType, others: Callable[..., Any] | None) -> None:
    """Puts code in place. The code before calls it from now on: `gm.forward = wrapped(gm.forward)` holds that."""
    replaced: FunctionType | None = vars(owner).get(WRITTEN)
    setattr(owner, WRITTEN, written)
    owner.forward = others or written
    if replaced is not None:
        cast(Any, replaced).__signature__ = inspect.signature(replaced)
        replaced.__code__ = _call_written.__code__
        replaced.__defaults__ = replaced.__kwdefaults__ = None  # those of the code in place hold


def _call_written(self: Any, *args: Any, **kwargs: Any) -> Any:
    return type(self)._written(self, *args, **kwargs)
