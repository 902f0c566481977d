"""Finds the grid that was flattened into a token axis: which rows and columns of the images its positions come from."""

from __future__ import annotations

from math import prod
from typing import NamedTuple, cast

import torch
from torch import fx

from ..ops.rows import TokenRows
from ..tracing.graphs import ancestors, shape_of
from ..tracing.joins import Join
from .moves import residual_of
from .positionwise import Layout

# A longer prefix cannot be class, distillation and register tokens.
_LONGEST_PREFIX = 16


class Origin(NamedTuple):
    """Where the sizes of a grid can be read at run time.

    Attributes:
        node: Name of a node whose value has the grid as axes.
        axes: The axes of the grid there, one per axis of the grid.
    """

    node: str
    axes: tuple[int, ...]


class Flattening(NamedTuple):
    """Where a grid became a token axis.

    Attributes:
        node: The node that flattened it.
        join: Sizes of the grid, and its axes in the input of `node`. Axis 0 stands for frames in the batch axis.
    """

    node: fx.Node
    join: Join


def image_rank(graph: fx.Graph) -> int:
    """Axes of a grid: 2 for images, 3 for clips."""
    return len(_image_shape(graph)) - 2


def flattening_of(stream: fx.Node) -> Flattening | None:
    """Where a grid became the tokens of `stream`, (B, N, C); None if nothing upstream flattens one of at most N positions."""
    tokens = cast("tuple[int, ...]", shape_of(stream))[1]
    rank = image_rank(stream.graph)
    for node in ancestors(stream):
        for join in reversed(node.meta.get("joins", [])):
            if len(join.grid) == rank and prod(join.grid) <= tokens:
                return Flattening(node, join)
    return _folded_flattening(stream, tokens) if rank == 3 else None


def grid_of(value: fx.Node, layout: Layout) -> tuple[TokenRows, Origin] | None:
    """What the positions of `value` stand for and where the grid can be read; None if no grid is found for a token axis."""
    shape = cast("tuple[int, ...]", shape_of(value))
    axes = tuple(layout.index(letter) for letter in "THW" if letter in layout)
    if axes:
        return TokenRows(tuple(shape[axis] for axis in axes)), Origin(value.name, axes)
    found = _flattened(value, layout.index("N")) or _flattened(value, layout.index("N"), shortcuts=True)
    if found is None:
        return None
    node, join = found
    rows = TokenRows(join.grid, shape[layout.index("N")] - prod(join.grid))
    return rows, Origin(node.all_input_nodes[0].name, join.axes)


def _image_shape(graph: fx.Graph) -> tuple[int, ...]:
    return cast("tuple[int, ...]", shape_of(graph.find_nodes(op="placeholder")[0]))


def _folded_flattening(stream: fx.Node, tokens: int) -> Flattening | None:
    """Where frames are embedded as images, (B * t, n, C), and joined to (B, t * n, C) later."""
    above = list(ancestors(stream))
    for node in above:
        for join in node.meta.get("joins", []):
            if len(join.grid) != 2 or prod(join.grid) > tokens:
                continue
            for earlier in above[above.index(node) :]:
                for frames, inner in earlier.meta.get("folded", []):
                    if len(inner.grid) == 2 and (frames, prod(inner.grid)) == join.grid:
                        return Flattening(earlier, Join((frames, *inner.grid), (0, *inner.axes)))
    return None


def _flattened(node: fx.Node, axis: int, *, shortcuts: bool = False) -> Flattening | None:
    """Where a grid became one axis of `node`, upstream through operations that keep positions in their places.

    Args:
        node: The value.
        axis: Its axis.
        shortcuts: Whether to pass residual additions by their shortcut, and not by their first operand.
    """
    count = cast("tuple[int, ...]", shape_of(node))[axis]
    while True:
        shortcut = residual_of(node) if shortcuts else None
        before = shortcut or next((n for n in node.all_input_nodes if len(shape_of(n) or ()) == 3), None)
        shape = shape_of(before) if before else None
        if before is None or shape is None or count not in shape[1:]:
            return _exact(node, count) or next((f for above in ancestors(node) if (f := _with_prefix(above, count))), None)
        if node.target in ("transpose", "permute", torch.transpose, torch.permute):
            axis = 3 - axis
        if shape[axis] != count or (node.op == "call_method" and node.target not in ("transpose", "permute", "contiguous")):
            return None
        node = before


def _exact(node: fx.Node, count: int) -> Flattening | None:
    """The flattening of a grid of `count` positions that `node` does."""
    return next((Flattening(node, join) for join in _grids_flattened_by(node) if prod(join.grid) == count), None)


def _with_prefix(node: fx.Node, count: int) -> Flattening | None:
    """The flattening by `node` of a grid of a few positions less than `count`, with the aspect of the images."""
    height, width = _image_shape(node.graph)[-2:]
    for join in _grids_flattened_by(node):
        same_aspect = abs(join.grid[-2] * width / height - join.grid[-1]) < 1  # heads and their channels are flattened too
        if same_aspect and 0 < count - prod(join.grid) <= _LONGEST_PREFIX:
            return Flattening(node, join)
    return None


def _grids_flattened_by(node: fx.Node) -> list[Join]:
    rank = image_rank(node.graph)
    return [join for join in node.meta.get("joins", []) if len(join.grid) == rank and not join.windows]
