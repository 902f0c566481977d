"""`int` and `float` of a traced size: nodes of the graph, so that code such as `int(x.shape[0] / windows)` follows the images.

Both are types, which Python calls without asking their argument. So while a model is traced, the modules of its code see
stand-ins under these names. A stand-in acts like the type, except that it records a call on a traced number.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


def stand_in(kind: type, record: Callable[[Any], Any]) -> type:
    """A class that acts like `kind`.

    Args:
        kind: `int` or `float`.
        record: Called with the argument of a call; returns what the call returns, or None to call `kind` itself.
    """

    class Meta(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            recorded = record(args[0]) if len(args) == 1 and not kwargs else None
            return kind(*args, **kwargs) if recorded is None else recorded

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, kind)

        def __subclasscheck__(cls, subclass: type) -> bool:
            return issubclass(subclass, kind)

        def __getattr__(cls, name: str) -> Any:
            return getattr(kind, name)

        def __eq__(cls, other: object) -> bool:
            return other is kind or other is cls

        def __hash__(cls) -> int:
            return hash(kind)

        def __or__(cls, other: Any) -> Any:
            return kind | other

        def __ror__(cls, other: Any) -> Any:
            return other | kind

    return Meta(kind.__name__, (), {})


@contextmanager
def standing_in(model: nn.Module, record: Callable[[type, Any], Any]) -> Generator[None]:
    """While active, `int` and `float` are stand-ins in the code of the model's modules.

    Args:
        model: The model.
        record: Called with the type and the argument; see `stand_in`.
    """
    with ExitStack() as stack:
        for namespace in _namespaces(type(module) for module in model.modules()):
            for kind in (int, float):
                if kind.__name__ not in namespace:
                    namespace[kind.__name__] = stand_in(kind, lambda value, kind=kind: record(kind, value))
                    stack.callback(namespace.pop, kind.__name__, None)
        yield


def _namespaces(kinds: Iterable[type[nn.Module]]) -> list[dict[str, Any]]:
    """The global names of the Python modules in which classes and their bases are written, PyTorch's own excepted."""
    names = {base.__module__ for kind in kinds for base in kind.__mro__ if issubclass(base, nn.Module)}
    return [vars(sys.modules[name]) for name in names if name in sys.modules and name.split(".")[0] != "torch"]
