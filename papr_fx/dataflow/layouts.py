"""Where code after the blocks lays the patches out as their grid again: `tokens.reshape(B, h, w, C)`, for one.

The kept ones can become a grid of k rows and one column. That is enough where the grid is only pooled. Where anything else is
done with it, or it is returned, the kept patches must be put back in their places.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any, cast

import torch
from torch import Tensor, fx

from ..errors import NoSiteError
from ..tracing.blocks import block_of, is_inside
from ..tracing.fakes import TRACED_BATCH
from ..tracing.graphs import called, shape_of
from .arguments import view_sizes
from .pooling import WatchPositions
from .repairs import PlaceSite, View
from .token_run import RunError, TokenRun, is_size

_LAYOUTS = ("reshape", "view", "unflatten", "flatten", "view_as", "reshape_as", "fold")
_STACKS = ("cat", "concat", "concatenate")


class MixingError(NoSiteError):
    """What follows the blocks needs all tokens in their places, and leads to blocks again."""


class RestoreError(Exception):
    """Patches must be put back in their places where some nodes lay them out.

    Attributes:
        layouts: Names of these nodes.
    """

    def __init__(self, layouts: Collection[str]) -> None:
        super().__init__()
        self.layouts = {*layouts}


class Layouts:
    """The nodes that lay the patches out.

    Args:
        run: The run.
        restored: Names of those before which the patches are put back.

    Attributes:
        columns: Those that make a grid of one column.
        places: Those before which the patches are put back.
        wrong: Names of those of the first kind that must be of the second.
    """

    def __init__(self, run: TokenRun, restored: Collection[str]) -> None:
        self._run = run
        self._restored = restored
        self._in_column: dict[fx.Node, frozenset[str]] = {}  # values of a grid of one column, by the layouts that made it
        self._in_place: dict[fx.Node, str] = {}  # values that follow from patches in their places
        self.columns: list[View] = []
        self.places: list[PlaceSite] = []
        self.wrong: set[str] = set()

    def follow(self, node: fx.Node, run: Callable[[], Any]) -> Any:
        """The result of `run`, which runs `node`; that of the dense graph where it needs the patches in their places.

        Raises:
            MixingError: A block reads what was computed from patches in their places.
            RestoreError: The result is no tensor, and needs them.
        """
        out = self._laid_out(node)  # first: with as many channels as patches, a size of -1 may hide what is laid out
        if out is not None:
            return out
        layout = next((self._in_place[n] for n in node.all_input_nodes if n in self._in_place), None)
        if layout is not None:
            self._check_behind(node, layout)
            self._in_place[node] = layout
        names = self._names(node)
        if not names:
            return run()
        if node.op == "output":
            if not all(self._may_return(n) for n in node.all_input_nodes):
                raise RestoreError(names)
            return run()
        with WatchPositions(self._patches[1]) as watched:
            out = run()
        read = node.meta.get("read") and is_number(out) and not _is_whole(node, out)
        if watched.mixing or read or not self._is_column(node, out):
            return self.give_up(node)
        if isinstance(out, tuple | list) or not _is_whole(node, out):
            self._in_column[node] = names
        return out

    def give_up(self, node: fx.Node) -> Any:
        """What `node` computes in the dense graph, if it reads a grid of one column; otherwise None.

        Raises:
            RestoreError: It does, and does not compute a tensor.
        """
        names, shape = self._names(node), shape_of(node)
        if not names:
            return None
        if shape is None:
            raise RestoreError(names)
        self.wrong |= names
        return cast(Tensor, self._run.env[self._run.stream.node]).new_empty(shape, dtype=node.meta["dtype"])

    def _laid_out(self, node: fx.Node) -> Any:
        """What `node` makes of the kept patches, if it lays them out; None if it does not."""
        site = self._site(node)
        if site is None:
            return None
        out = None if node.name in self._restored else self._viewed(node, site.place)
        if out is None:
            return self._restore(node, site)
        self.columns.append(View(node.name, cast(int, site.place), len(self._grid)))
        self._in_column[node] = self._names(node) | {node.name}
        return out

    @property
    def _grid(self) -> tuple[int, ...]:
        return self._run.stream.rows.grid

    @property
    def _column(self) -> tuple[int, ...]:
        return self._patches[1], *[1] * (len(self._grid) - 1)

    @property
    def _patches(self) -> tuple[int, int]:
        """How many patches there are, all and kept."""
        return self._run.lengths[self._run.stream.rows.spans[-1]]

    def _names(self, node: fx.Node) -> frozenset[str]:
        return frozenset[str]().union(*(self._in_column.get(n, ()) for n in node.all_input_nodes))

    def _site(self, node: fx.Node) -> PlaceSite | None:
        """Where `node`, after the blocks, splits or flattens the axis of the patches; None if it does not."""
        run = self._run
        if run.in_block(node) or not self._lays_out(node):
            return None
        source = node.all_input_nodes[0]
        value, before, after = run.env[source], shape_of(source), shape_of(node)
        if not isinstance(value, Tensor) or before is None or after is None or len(before) != value.ndim:
            return None
        changed = [axis for axis, sizes in enumerate(zip(before, value.shape, strict=True)) if sizes[0] != sizes[1]]
        if len(changed) != 1 or (before[changed[0]], value.shape[changed[0]]) != self._patches or not changed[0]:
            return None
        (axis,), stacked = changed, _stacked(source)
        place, given = _place(before[:axis], after, self._grid), grid_sizes(node)
        if place is None and not self._takes_apart(node, before, after, axis):
            return None
        counted = any(is_size(run.env[n]) and not run.is_dense(n) for n in node.all_input_nodes)
        first = None if place is None or given is None else place - given[1]
        if not stacked or (counted and first is None):
            return None
        return PlaceSite(node.name, source.name, axis, first, counted, stacked)

    def _lays_out(self, node: fx.Node) -> bool:
        """Whether a node calls what may change shapes only."""
        if node.op == "call_module":
            module = self._run.fetch_attr(str(node.target))
            return not any(True for _ in (*module.parameters(), *module.buffers()))
        return called(node) in _LAYOUTS and bool(node.args) and isinstance(node.args[0], fx.Node)

    def _takes_apart(self, node: fx.Node, before: Sequence[int], after: Sequence[int], axis: int) -> bool:
        """Whether the patches, on `axis`, are no axis of the result, which holds the same numbers in order."""
        if called(node) == "fold":
            return True
        lead, ends = prod(before[:axis]), [*accumulate(after, mul)]
        kept = any(end == lead and size == before[axis] for end, size in zip(ends, after[1:], strict=False))
        frames = len(self._grid) == 3 and after[:3] == (before[0] * self._grid[0], *self._grid[1:])
        return prod(before) == prod(after) and not kept and (frames or lead in ends)

    def _viewed(self, node: fx.Node, place: int | None) -> Tensor | None:
        """The kept patches as a grid of one column; None if the node gets no sizes, or takes no such grid."""
        dense, given = shape_of(node), grid_sizes(node)
        if place is None or given is None or dense is None:
            return None
        sizes, first = given
        value, end = self._run.env[node.all_input_nodes[0]], place + len(self._grid)
        sizes = [self._run.env[size] if isinstance(size, fx.Node) else size for size in sizes]
        sizes[place:end] = self._column
        try:
            out = value.unflatten(first, sizes) if called(node) == "unflatten" else value.reshape(sizes)
        except (RuntimeError, TypeError):  # a shape is no size
            return None
        return out if tuple(out.shape) == (*dense[: first + place], *self._column, *dense[first + end :]) else None

    def _restore(self, node: fx.Node, site: PlaceSite) -> Any:
        """What `node` makes of the patches in their places, as in the dense graph; None if it does not take them."""
        run = self._run
        before = dict(run.env)
        run.env |= {n: n.meta["value"] for n in node.all_input_nodes if is_size(run.env[n])}
        source = node.all_input_nodes[0]
        run.env[source] = run.env[source].new_empty(cast("tuple[int, ...]", shape_of(source)))
        try:
            out = run.plain(node)
        except RunError:
            return None
        finally:
            run.env = before
        if not isinstance(out, Tensor) or not _is_whole(node, out):
            return None
        self.places.append(site)
        self._in_place[node] = node.name
        return out

    def _check_behind(self, node: fx.Node, layout: str) -> None:
        blocks = (*self._run.stream.blocks, *self._run.stream.others)
        name = block_of(node, blocks)
        if name is None and node.op == "call_module" and any(is_inside(block, str(node.target)) for block in blocks):
            name = str(node.target)
        if name is not None:
            raise MixingError(
                f"tokens cannot be dropped: `{name}` runs on what follows from the grid that `{layout}` makes of them"
            )

    def _is_column(self, node: fx.Node, out: Any) -> bool:
        """Whether a result has its dense shape, except that the grid may be a column and tokens fewer."""
        if isinstance(out, tuple | list):
            parts = zip(node.meta.get("parts", ()), cast("Sequence[Any]", out), strict=False)
            return isinstance(out, torch.Size) or all(known and self._is_column_of(known, part.shape) for known, part in parts)
        if isinstance(out, Tensor):
            return self._is_column_of(shape_of(node) or (), out.shape)
        # Any other container is returned.
        return is_number(out) or all(self._may_return(n) for n in node.all_input_nodes)

    def _is_column_of(self, dense: Sequence[int], sizes: Sequence[int]) -> bool:
        if len(dense) != len(sizes):
            return False
        changed = [pair for pair in zip(dense, sizes, strict=True) if pair[0] != pair[1]]
        column = [pair for pair in zip(self._grid, self._column, strict=True) if pair[0] != pair[1]]
        return sorted(changed) == sorted(column) or set(changed) <= {*self._run.lengths.values()}

    def _may_return(self, node: fx.Node) -> bool:
        """Whether a value is no grid of one column: it is as in the dense graph, or a row of tokens."""
        value = self._run.env[node]
        if node not in self._in_column or not isinstance(value, Tensor):
            return node not in self._in_column or is_number(value)
        pairs = zip(shape_of(node) or (), value.shape, strict=True)
        return {pair for pair in pairs if pair[0] != pair[1]} <= {*self._run.lengths.values()}


def grid_sizes(node: fx.Node) -> tuple[list[Any], int] | None:
    """The sizes that a reshape gets, and the axis of its result that the first of them is for; None for other nodes."""
    name, given = called(node), node.args[1:]
    if name == "unflatten" and len(given) == 2 and isinstance(given[0], int):
        return list(cast("Sequence[Any]", given[1])), given[0] % len(shape_of(node.all_input_nodes[0]) or (0,))
    return (view_sizes(node), 0) if name in ("reshape", "view") else None


def set_grid(node: fx.Node, place: int, grid: Sequence[Any]) -> None:
    """Writes the sizes of a grid into those of a reshape, from `place` on."""
    sizes, _ = cast("tuple[list[Any], int]", grid_sizes(node))
    sizes[place : place + len(grid)] = grid
    node.args = (*node.args[:2], tuple(sizes)) if called(node) == "unflatten" else (node.args[0], tuple(sizes))


def is_number(value: object) -> bool:
    """Whether a value is a number or truth value."""
    return isinstance(value, int | float)


def _place(lead: Sequence[int], after: Sequence[int], grid: Sequence[int]) -> int | None:
    """The axis of a result from which on it has the sizes of the grid, with as many positions before it as `lead`."""
    ends = [1, *accumulate(after, mul)]
    found = (place for place in range(len(after)) if tuple(after[place : place + len(grid)]) == tuple(grid))
    return next((place for place in found if ends[place] == prod(lead)), None)


def _stacked(node: fx.Node) -> int:
    """How many values of the traced batch lie one after the other along the first axis of a value; 0 if it is another axis."""
    size = (shape_of(node) or (0,))[0]
    if size == TRACED_BATCH:
        return 1
    while node.all_input_nodes:
        if called(node) in _STACKS:
            apart = all((shape_of(n) or (0,))[0] == TRACED_BATCH for n in node.all_input_nodes)
            along = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
            return size // TRACED_BATCH if apart and along == 0 else 0
        node = node.all_input_nodes[0]
        if (shape_of(node) or (0,))[0] != size:
            return 0
    return 0


def _is_whole(node: fx.Node, out: Any) -> bool:
    """Whether a tensor or number is as in the dense graph."""
    return tuple(out.shape) == shape_of(node) if isinstance(out, Tensor) else out == node.meta.get("value")
