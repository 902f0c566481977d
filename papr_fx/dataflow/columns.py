"""Which outputs of a linear layer each of its readers gets, where the code between them only moves values.

The nodes between them are run on the numbers of the layer's values. So it does not matter how queries, keys and values are
told apart: by a reshape and a permutation, by `chunk`, by slices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx

from ..tracing.fakes import MODEL_ERRORS
from ..tracing.graphs import called, leaves_of, shape_of
from .arguments import UnknownError, filled, sizes_of
from .positionwise import PERMUTATIONS

_VIEWS = ("view", "reshape", "flatten", "unflatten", "contiguous", "squeeze", "unsqueeze")
_PARTS = ("unbind", "chunk", "split", "tensor_split", "getitem", "select", "narrow")
_MOVES = (*PERMUTATIONS, *_VIEWS, *_PARTS)


class Columns(NamedTuple):
    """A value that holds neighbouring outputs of a linear layer, for each sample and row.

    Attributes:
        start: The first of them.
        sizes: The axes that they are split into.
        order: Samples, rows and these axes, in the order in which they are axes of the value.
    """

    start: int
    sizes: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def stop(self) -> int:
        """The end of them."""
        return self.start + prod(self.sizes)


def origin_of(value: fx.Node) -> fx.Node:
    """The value of which `value` was made by moving values alone."""
    while _moves(value):
        value = value.all_input_nodes[0]
    return value


def columns_of(layer: fx.Node, end: fx.Node) -> dict[fx.Node, Columns]:
    """What is read of a layer's result (B, N, M): `end`, and what other nodes read that do more than move values.

    Empty if any of it is anything else than columns.
    """
    shape = shape_of(layer)
    if shape is None or len(shape) != 3:
        return {}
    values: dict[fx.Node, Any] = {layer: torch.arange(prod(shape), device="cpu").view(shape)}
    found: dict[fx.Node, Columns] = {}
    for node in _moved(layer, values, end):
        numbers = values[node]
        columns = _columns(numbers, shape) if isinstance(numbers, Tensor) and numbers.dtype == torch.int64 else None
        if columns is None:
            return {}
        found[node] = columns
    return found


def _moves(node: fx.Node) -> bool:
    """Whether a node may do no more than move the values of its first argument."""
    return node.op in ("call_method", "call_function") and called(node) in _MOVES and bool(node.all_input_nodes)


def _moved(layer: fx.Node, values: dict[fx.Node, Any], end: fx.Node) -> list[fx.Node]:
    """Puts the numbers that each node as far as `end` moves into `values`; returns those nodes that others read."""
    read: dict[fx.Node, None] = {}
    waiting = [layer]
    for node in waiting:
        for user in node.users:
            if node is end or not _moves(user) or user.all_input_nodes[0] is not node:
                read[node] = None
            elif user not in values:
                moved = _run(user, values)
                if moved is None:
                    read[node] = None
                else:
                    values[user] = moved
                    waiting.append(user)
    return list(read)


def _run(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """What a node makes of numbers; None if that cannot be known."""
    try:
        given = [
            leaf if not isinstance(leaf, fx.Node) else values[leaf] if leaf in values else sizes_of(leaf, {})
            for leaf in leaves_of((node.args, node.kwargs))
        ]
        args, kwargs = filled(node, given)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return cast(Callable[..., Any], node.target)(*args, **kwargs)
    except (UnknownError, *MODEL_ERRORS):
        return None


def _columns(numbers: Tensor, shape: tuple[int, ...]) -> Columns | None:
    """The columns of an array (B, N, M) of the numbers from 0 on that `numbers` holds; None if they are no such."""
    first = int(numbers.flatten()[0])
    axes = range(numbers.ndim)
    strides = [int(numbers.select(axis, 1).flatten()[0]) - first if numbers.shape[axis] > 1 else 0 for axis in axes]
    expected = torch.full_like(numbers, first)
    for axis in axes:
        steps = torch.arange(numbers.shape[axis], device=numbers.device) * strides[axis]
        expected = expected + steps.view([-1 if other == axis else 1 for other in axes])
    if not torch.equal(numbers, expected):
        return None
    samples = [axis for axis in axes if (strides[axis], numbers.shape[axis]) == (shape[1] * shape[2], shape[0])]
    rows = [axis for axis in axes if (strides[axis], numbers.shape[axis]) == (shape[2], shape[1])]
    rest = sorted((axis for axis in axes if axis not in (*samples, *rows)), key=lambda axis: -strides[axis])
    sizes = tuple(numbers.shape[axis] for axis in rest)
    if (len(samples), len(rows)) != (1, 1) or not rest or not _neighbours([strides[axis] for axis in rest], sizes):
        return None
    found = [*samples, *rows, *rest]
    return Columns(first, sizes, tuple(found.index(axis) for axis in axes))


def _neighbours(strides: list[int], sizes: tuple[int, ...]) -> bool:
    """Whether axes with these strides and sizes, the widest stride first, count neighbouring columns."""
    real = [(stride, size) for stride, size in zip(strides, sizes, strict=True) if size > 1] or [(1, 1)]
    return real[-1][0] == 1 and all(wide[0] == narrow[0] * narrow[1] for wide, narrow in pairwise(real))
