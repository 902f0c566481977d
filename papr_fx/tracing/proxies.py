"""Proxies that know their values.

Questions about a value (`.dtype`, `.ndim`, whether a size is divisible) are answered from the fake tensor. Sizes stay nodes of
the graph, so that any batch size runs. Where a model's code reads a size as a Python number, the node is marked `read`, so
that the caller can refuse it.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, cast

from torch import Tensor, fx

from ..errors import TraceError

# Facts of a tensor that tracing never changes. They are answered at once and never recorded.
_FIXED_ATTRIBUTES = frozenset(
    {"dtype", "device", "ndim", "layout", "is_cuda", "is_sparse", "is_quantized", "is_nested", "requires_grad", "is_meta"}
)
# What calls the code of a model, or is called by it.
_NOT_THE_MODELS = sys.stdlib_module_names | {"papr_fx", "torch", "einops"}


class ValueProxy(fx.Proxy):
    """A proxy that knows its fake value. The tracer keeps it under the proxy's node."""

    @property
    def known(self) -> Any:
        """The fake value."""
        return cast(Any, self.tracer).values[self.node]

    def __getattr__(self, k: str) -> Any:
        if k in _FIXED_ATTRIBUTES and isinstance(self.known, Tensor):
            return getattr(self.known, k)
        if getattr(self.known, k, "") is None:
            return None  # code asks `is None`, which no proxy can answer
        return ValueAttribute(self, k)

    def __len__(self) -> int:
        self._read()
        return len(self.known)

    def __iter__(self) -> Iterator[Any]:
        self._read()
        return (self[i] for i in range(len(self.known)))  # pyright: ignore[reportIndexIssue]

    def __contains__(self, item: object) -> bool:
        return bool(self.tracer.create_proxy("call_function", operator.contains, (self, item), {}))  # a value that is read

    def __index__(self) -> int:
        return int(self._number())

    def __int__(self) -> int:
        return int(self._number())

    def __float__(self) -> float:
        return float(self._number())

    def __hash__(self) -> int:
        """A number is found among the keys of a dictionary by its value, which is then read."""
        if isinstance(self.known, int | float):
            return hash(self._number())
        return object.__hash__(self)

    def __format__(self, spec: str) -> str:
        """For messages. An assertion may stay in the graph: its message must not show the traced value as the current one."""
        return self.node.name if isinstance(self.known, Tensor) else f"{self.node.name} ({self.known} when traced)"

    def __round__(self, digits: int | None = None) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", round, (self,) if digits is None else (self, digits), {})

    def __abs__(self) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", abs, (self,), {})

    def __divmod__(self, other: Any) -> tuple[fx.Proxy, fx.Proxy]:
        return self // other, self % other

    def _read(self) -> None:
        """Marks where Python code reads this value: whatever it computes from it is a constant of the graph."""
        self.node.meta["read"] = place()

    def _number(self) -> float:
        self._read()
        if isinstance(self.known, Tensor):
            raise TraceError(f"`{self.node.name}` is read as a Python number: its value depends on the image")
        return self.known


class ValueAttribute(ValueProxy):
    """`proxy.name`: recorded as a node only once it is used as a value. A call of it is one method node."""

    def __init__(self, owner: ValueProxy, name: str) -> None:
        self.tracer = owner.tracer
        self._owner = owner
        self._name = name
        self._node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The node, recorded at its first use."""
        if self._node is None:
            proxy = self.tracer.create_proxy("call_function", getattr, (self._owner, self._name), {})
            self._node = proxy.node
        return self._node

    def __call__(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_method", self._name, (self._owner, *args), kwargs)


def place() -> str:
    """Where the model's code is that runs now: folder, file and line."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _package(frame) in _NOT_THE_MODELS:
        if frame.f_code.co_name == "trace" and _package(frame) == "papr_fx":  # all of it is PyTorch's
            frame = None
            break
        frame = frame.f_back
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}, line {frame.f_lineno}" if frame else "in torch"


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]
