"""Containers of classes that a graph cannot hold as an argument: it holds a call that makes them again."""

from __future__ import annotations

import copyreg
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

from torch import Tensor, fx
from torch.fx.immutable_collections import immutable_dict, immutable_list

from ..errors import TraceError


def is_container(value: object) -> bool:
    """Whether a value is a subclass of dict, list or tuple, or a dataclass, whose class `fx` would lose or not build."""
    if isinstance(value, Tensor | fx.Proxy | fx.Node | type) or hasattr(value, "_fields"):  # `fx` keeps named tuples
        return False
    if is_dataclass(value):
        return not isinstance(value, dict) and _needs_copying(value)
    plain = type(value) in (dict, list, tuple, immutable_dict, immutable_list)
    return isinstance(value, dict | list) and not plain


def _needs_copying(value: Any) -> bool:
    """Whether the constructor of a dataclass takes something else than its fields, or computes."""
    return (
        hasattr(value, "__post_init__") or not value.__dataclass_params__.init or not all(field.init for field in fields(value))
    )


@dataclass(frozen=True)
class Rebuild:
    """Makes a container of a class again, by Python's protocol for copies. It calls no constructor of a user's class.

    Attributes:
        make: Makes an empty one.
        arguments: What `make` takes: classes and constants.
    """

    make: Any
    arguments: tuple[Any, ...]

    __module__ = __name__

    @property
    def __name__(self) -> str:
        """How text shows a call of it."""
        return "rebuild_" + getattr(self.arguments[0] if self.arguments else self.make, "__name__", "container")

    def __call__(self, state: dict[str, Any] | None, items: Iterable[Any], pairs: Iterable[tuple[Any, Any]]) -> Any:
        """The container with these attributes and parts."""
        made = self.make(*self.arguments)
        for name, value in (state or {}).items():
            object.__setattr__(made, name, value)
        if items:
            made.extend(items)
        for key, value in pairs:
            made[key] = value
        return made


def rebuilt(value: Any) -> tuple[Any, tuple[Any, ...]]:
    """A function, and arguments that may hold proxies, that make a container like `value` again.

    Raises:
        TraceError: Its class says how it is copied in a way of its own.
    """
    if type(value) is OrderedDict:
        return OrderedDict, (list(value.items()),)
    if is_dataclass(value) and not isinstance(value, dict | list):
        state = {field.name: getattr(value, field.name) for field in fields(value) if hasattr(value, field.name)}
        return Rebuild(copyreg.__newobj__, (type(value),)), (state, [], [])  # pyright: ignore[reportAttributeAccessIssue]
    make, arguments, state, items, pairs = (*cast("tuple[Any, ...]", value.__reduce_ex__(2)), None, None, None)[:5]
    if isinstance(state, tuple):  # of a class with slots
        state = {
            name: part for parts in cast("tuple[dict[str, Any] | None, ...]", state) for name, part in (parts or {}).items()
        }
    if not isinstance(state, dict | None):
        raise TraceError(
            f"{type(value).__name__} among the outputs has a `__getstate__` or `__reduce__` of its own, so a graph cannot make "
            "it again: return a plain dict, list or dataclass"
        )
    return Rebuild(make, arguments or ()), (state, list(items or ()), list(pairs or ()))
