"""The arguments of a node by their places, and the sizes that nodes compute from the shapes of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import fx
from torch.fx.node import map_aggregate

from ..tracing.fakes import MODEL_ERRORS
from ..tracing.graphs import called, shape_of

_RESHAPES = ("view", "reshape")


@dataclass(frozen=True)
class Rows:
    """The first rows of a token axis.

    Attributes:
        count: How many.
        of: How many rows there are, on the traced images.
    """

    count: int
    of: int


class Argument(NamedTuple):
    """An argument that a node may get rows of.

    Attributes:
        place: Its place among the arguments, see `leaves_of`.
        axis: Its axis of rows, counted from the end, which leading axes do not change.
    """

    place: int
    axis: int


class UnknownError(Exception):
    """A value, or what a node makes of some values, cannot be known."""


def filled(node: fx.Node, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a node with these values in the places of its leaves."""
    rest = iter(values)
    return map_aggregate(cast(Any, (node.args, node.kwargs)), lambda _: next(rest))


def count_place(node: fx.Node, axis: int | None, count: int) -> int | None:
    """The place of the number of rows among the sizes that a reshape gets; None if it gets no such number."""
    if axis is None or called(node) not in _RESHAPES:
        return None
    sizes = view_sizes(node)
    place = axis % len(sizes) if -axis <= len(sizes) else None
    known = shape_of(node) or ()
    if place is None or len(known) != len(sizes) or sizes[place] == -1:
        return None
    return place if known[place] == count else None


def view_sizes(node: fx.Node) -> list[Any]:
    """The sizes that a reshape gets."""
    sizes = list(node.args[1:])
    return list(cast("Sequence[Any]", sizes[0])) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes


def sizes_of(node: fx.Node, shapes: Mapping[fx.Node, tuple[int, ...]]) -> Any:
    """What a node computes from the shapes of tensors: a size, a shape, a truth value.

    Args:
        node: A node whose value is no tensor.
        shapes: Shapes of tensors that differ from the recorded ones.
    """
    if "value" in node.meta and not shapes:
        return node.meta["value"]
    shape = shapes.get(node, shape_of(node))
    if shape is not None:
        return torch.empty(shape, device="meta")
    if node.op not in ("call_function", "call_method"):
        raise UnknownError(f"`{node.name}` is no size")
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: sizes_of(n, shapes))
    try:
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return cast(Callable[..., Any], node.target)(*args, **kwargs)
    except MODEL_ERRORS as error:
        raise UnknownError(type(error).__name__) from error
