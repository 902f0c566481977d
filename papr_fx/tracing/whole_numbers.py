"""`int` and `float` of a traced size: nodes of the graph, so that code such as `int(x.shape[0] / windows)` follows the images.

Both are types, which Python calls without asking their argument. So the code of a traced model sees stand-ins under these
names. A stand-in acts like the type, except that it records a call on a traced number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


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
