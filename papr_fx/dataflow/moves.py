"""Positions in another order than the image's, such as MaxViT's windows, where the model only moved values.

The nodes that moved them are run on the numbers of the grid's cells. The result says where every position went.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, fx, nn

from ..tracing.fakes import MODEL_ERRORS, TRACED_BATCH
from ..tracing.graphs import Run, called, shape_of
from .positionwise import PERMUTATIONS, Layout

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_MOVES = (*PERMUTATIONS, "view", "reshape", "flatten", "unflatten", "contiguous", "clone")


@dataclass(frozen=True)
class Moves:
    """How positions came into their order. Nodes are stored by name, so that it holds for copies of their graph.

    Attributes:
        origin: The value whose positions are in the order of the image.
        layout: Its axes, BCHW or BHWC.
        path: The nodes that move the positions from there, in order.
        cells: The cell of the grid that each position holds in the end.
    """

    origin: str
    layout: Layout
    path: tuple[str, ...]
    cells: tuple[int, ...] = field(repr=False)


def operands(addition: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two values of equal shape, (B, ., C) or with a grid, that a node adds; None if it is no such addition."""
    if addition.target not in _ADDITIONS or len(addition.args) != 2 or addition.kwargs:
        return None
    a, b = addition.args
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b:
        return None
    shape = shape_of(addition) or ()
    alike = shape_of(a) == shape == shape_of(b)
    return (a, b) if alike and len(shape) in (3, 4, 5) and shape[:1] == (TRACED_BATCH,) else None


def residual_of(addition: fx.Node) -> fx.Node | None:
    """The shortcut of a residual addition: the operand with fewer ancestors; None if it is no such addition."""
    pair = operands(addition)
    if pair is None:
        return None
    waiting = {pair[0]: {0}, pair[1]: {1}}  # for which operand a node is needed
    work = [(0, 0), (0, 0)]
    node = addition
    while any(len(readers) == 1 for readers in waiting.values()):  # ancestors of both count for neither
        node = node.prev
        readers = waiting.pop(node, set[int]())
        if len(readers) == 1:
            (reader,) = readers
            modules, nodes = work[reader]  # modules first: a branch may be one module, a shortcut many moves
            work[reader] = modules + (node.op == "call_module"), nodes + 1
        for needed in node.all_input_nodes if readers else ():
            waiting.setdefault(needed, set()).update(readers)
    return pair[work[1] < work[0]]


def find_moves(source: fx.Node, layout: Layout, root: nn.Module) -> Moves | None:
    """How the positions of `source`, with these axes, left the order of the image; None if nothing is found that moved them.

    The search goes up through nodes that move values and through residual additions. Then the path from the last value in
    image order down to `source` is replayed on cell numbers.
    """
    path: list[fx.Node] = []
    node: fx.Node | None = source
    while node is not None:
        before = _moved_from(node, root)
        if before is not None:
            path.insert(0, node)
        node = before or residual_of(node)
    if all(node.op == "call_module" and type(root.get_submodule(str(node.target))) is nn.Identity for node in path):
        return None
    for start in range(len(path)):
        for first in ("BCHW", "BHWC"):
            found = _replayed(path[start:], first, layout, root)
            if found is not None:
                return found if found.path else None
    return None


def copy_moves(graph: fx.Graph, origin: fx.Node, path: Sequence[fx.Node], start: fx.Node) -> list[fx.Node]:
    """Copies `path` into `graph`, at its insertion point, onto `start` in place of `origin`.

    Raises:
        ValueError: The path reads something other than moved values and their sizes.
    """
    copied = {origin: start}

    def copy(node: fx.Node) -> fx.Node:
        if node in copied:
            return copied[node]
        shortcut = residual_of(node)
        if shortcut:
            return copy(shortcut)
        if node.op == "placeholder" or (shape_of(node) is not None and node not in path):
            raise ValueError(f"`{node.name}` is not computed from `{origin.name}` only by moving values")
        args, kwargs = fx.map_arg((node.args, node.kwargs), copy)
        copied[node] = graph.create_node(node.op, node.target, args, kwargs, name=f"papr_{node.name}")
        return copied[node]

    return [copy(node) for node in path]


def _moved_from(node: fx.Node, root: nn.Module) -> fx.Node | None:
    """The input of a node that may do no more than move its values."""
    before = next((n for n in node.all_input_nodes if shape_of(n) is not None), None)
    shape = shape_of(node)
    if before is None or shape is None or prod(shape_of(before) or ()) != prod(shape):
        return None
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return None if any(True for _ in (*module.parameters(), *module.buffers())) else before
    return before if called(node) in _MOVES else None


def _replayed(path: Sequence[fx.Node], layout: Layout, last: Layout, root: nn.Module) -> Moves | None:
    """The moves of `path` from the last value in image order; None if more happens than moves, from axes `layout` to `last`."""
    origin = next(n for n in path[0].all_input_nodes if shape_of(n) is not None)
    sizes = shape_of(origin) or ()
    if len(sizes) != 4:
        return None
    rows, columns = (sizes[layout.index(axis)] for axis in "HW")
    shapes = {"BCHW": (1, 1, rows, columns), "BHWC": (1, rows, columns, 1)}
    numbers = torch.arange(rows * columns, device="cpu")
    part = fx.Graph()
    try:
        part.output(tuple(copy_moves(part, origin, path, part.placeholder("cells"))))
        trial = Run(root, graph=part)
        trial.extra_traceback = False  # a failure is a normal result here
        values: tuple[Tensor, ...] = trial.run(numbers.view(shapes[layout]))
    except MODEL_ERRORS:
        return None
    cells = values[-1].flatten()
    one_channel = values[-1].ndim == len(last) and values[-1].shape[last.index("C")] == 1
    if not one_channel or not torch.equal(cells.sort().values, numbers):
        return None
    start = 0
    for place, value in enumerate(values):
        ordered = [axes for axes, shape in shapes.items() if value.shape == shape and torch.equal(value.flatten(), numbers)]
        if ordered:
            start, origin, layout = place + 1, path[place], ordered[0]
    return Moves(origin.name, layout, tuple(node.name for node in path[start:]), tuple(cells.tolist()))
