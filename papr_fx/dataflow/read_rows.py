"""Which rows of each token value are read, from the outputs upwards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import fx

from ..tracing.graphs import descendants, leaves_of, shape_of
from .arguments import Argument, Rows, UnknownError, count_place, sizes_of
from .row_probe import RowProbe, Trial


@dataclass(frozen=True)
class RowReader:
    """A node that gets rows of some arguments.

    Attributes:
        node: The node.
        axis: The axis of its own value that then holds these rows only, counted from the end; None if its value stays whole.
        arguments: The arguments that it gets rows of.
        place: The place of the number of rows among its sizes, if it is a reshape.
    """

    node: fx.Node
    axis: int | None
    arguments: tuple[Argument, ...]
    place: int | None = None


@dataclass
class RowsRead:
    """What is known of a graph of which only some rows of the last tokens are read.

    Attributes:
        readers: Nodes that may get rows, by node.
        stopped: Values of which only rows are read, but which are needed whole, each with the reason.
        whole: What reads all rows of the last tokens, each with their value; the first is nearest to the output.
        axes: For each use of a value, the axis of rows that are read of it; None if all of them are.
    """

    readers: dict[fx.Node, RowReader] = field(default_factory=dict[fx.Node, RowReader])
    stopped: dict[fx.Node, str] = field(default_factory=dict[fx.Node, str])
    whole: list[tuple[fx.Node, fx.Node]] = field(default_factory=list[tuple[fx.Node, fx.Node]])
    axes: dict[fx.Node, set[int | None]] = field(default_factory=lambda: defaultdict[fx.Node, set[int | None]](set))

    def holds_rows(self, node: fx.Node) -> bool:
        """Whether the value of a node then holds these rows only."""
        return node in self.readers and self.readers[node].axis is not None

    def first_rows(self) -> dict[fx.Node, int]:
        """Values of which rows alone are read, made of values that stay whole; each with its axis of rows.

        They stay whole themselves, or hold rows: those of a part that their node takes of a larger value.
        """
        one = {node: next(iter(axes)) for node, axes in self.axes.items() if len(axes) == 1}
        return {
            node: axis
            for node, axis in one.items()
            if axis is not None and not any(self.holds_rows(value) for value in node.all_input_nodes)
        }


def find_rows_read(probe: RowProbe, stream: fx.Node, rows: Rows, barriers: Mapping[fx.Node, str]) -> RowsRead:
    """Finds the nodes that may get rows because nobody reads the others.

    Args:
        probe: Runs nodes on numbers.
        stream: The tokens before the first block. They, and what is in front of them, stay whole.
        rows: The rows that may be enough.
        barriers: Further values that stay whole, each with the reason.
    """
    whole = {stream: "holds the tokens before the first block", **barriers}
    while True:
        search = _Search(probe, stream, rows, whole)
        found = search.run()
        changed = _changed_sizes(found, rows)
        if not changed:
            return found
        whole |= dict.fromkeys(changed, "has a number of rows that is read")


class _Search:
    """One walk from the outputs upwards."""

    def __init__(self, probe: RowProbe, stream: fx.Node, rows: Rows, whole: Mapping[fx.Node, str]) -> None:
        self._probe = probe
        self._rows = rows
        self._whole = whole
        self._later = descendants(stream)
        self._found = RowsRead()

    def run(self) -> RowsRead:
        """Visits each node after all of its users."""
        for node in reversed(self._later):
            self._visit(node)
        return self._found

    def _visit(self, node: fx.Node) -> None:
        axes = self._found.axes.get(node, set())
        if _is_size(node):
            return  # sizes are looked at in the end
        axis = next(iter(axes), None) if len(axes) == 1 else None
        if axis is not None:
            reason = self._whole.get(node, "")
            trial = Trial(reason=reason) if reason else self._probe.trial(node, axis)
            if trial.arguments:
                self._note(RowReader(node, axis, trial.arguments, count_place(node, axis, self._rows.of)))
                return
            self._found.stopped[node] = trial.reason
        for part in node.users if "parts" in node.meta else ():  # the parts of a tuple are cut one by one instead
            self._found.readers.pop(part, None)
        self._read_whole(node)

    def _read_whole(self, node: fx.Node) -> None:
        """Notes what a node reads whose own value is needed whole."""
        tokens = [n for n in node.all_input_nodes if n in self._later and self._has_rows(n)]
        if tokens and node.op != "output" and not (self._has_rows(node) and len(shape_of(node) or ()) > 2):
            trial = self._probe.trial(node, None)
            if trial.arguments:
                self._note(RowReader(node, None, trial.arguments))
                return
        self._found.whole += [(node, value) for value in tokens]
        self._demand(node, {})

    def _note(self, reader: RowReader) -> None:
        self._found.readers[reader.node] = reader
        self._demand(reader.node, dict(reader.arguments))

    def _demand(self, node: fx.Node, cut: dict[int, int]) -> None:
        for place, leaf in enumerate(leaves_of((node.args, node.kwargs))):
            if isinstance(leaf, fx.Node):
                self._found.axes[leaf].add(cut.get(place))

    def _has_rows(self, node: fx.Node) -> bool:
        shapes = node.meta.get("parts", (shape_of(node),))
        return any(self._rows.of in (shape or ()) for shape in shapes)


def _is_size(node: fx.Node) -> bool:
    """Whether a value is a size, a shape or the like, which follows from the shapes of tensors."""
    if node.op == "output" or shape_of(node) is not None or "parts" in node.meta:
        return False
    try:
        return _is_plain(sizes_of(node, {}))
    except UnknownError:
        return False


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, cast("tuple[object, ...]", value)))
    return value is None or isinstance(value, int | float | torch.dtype | torch.device)


def _changed_sizes(found: RowsRead, rows: Rows) -> set[fx.Node]:
    """Values whose shape, once they hold rows only, changes a size that something else computes with."""
    shorter: dict[fx.Node, tuple[int, ...]] = {}
    for node, reader in found.readers.items():
        shape = shape_of(node)
        if reader.axis is not None and shape is not None:
            place = reader.axis % len(shape)
            shorter[node] = (*shape[:place], rows.count, *shape[place + 1 :])
    return {
        node for node in shorter if any(_matters(user, {node: shorter[node]}, found) for user in node.users if _is_size(user))
    }


def _matters(size: fx.Node, shapes: dict[fx.Node, tuple[int, ...]], found: RowsRead) -> bool:
    """Whether a size changes, and anything but the place of a reshape that gets the new number reads it."""
    try:
        if sizes_of(size, shapes) == sizes_of(size, {}):
            return False
    except UnknownError:  # an assertion fails
        return True
    return not size.users or any(_reads(user, size, shapes, found) for user in size.users)


def _reads(user: fx.Node, size: fx.Node, shapes: dict[fx.Node, tuple[int, ...]], found: RowsRead) -> bool:
    if _is_size(user):
        return _matters(user, shapes, found)
    place = found.readers[user].place if user in found.readers else None
    leaves = leaves_of(user.args)
    return place is None or [i for i, leaf in enumerate(leaves) if leaf is size] != [1 + place]
