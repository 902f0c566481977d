"""Graphs as text for review: one line per node, stable between runs and machines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

from torch import fx

from .fakes import TRACED_BATCH
from .graphs import descendants, shape_of

# A repeated group of nodes is shown once. Its size lies between a residual branch and a large block.
_MIN_GROUP, _MAX_GROUP = 3, 120


def graph_text(graph: fx.Graph, *, shrinking: bool = False) -> str:
    """The graph as lines `name = operation(inputs)  # shape`. B is the batch size.

    A chain of like modules (`blocks.0` to `blocks.11`, each fed by the one before) is one line. Of repeated groups of nodes,
    such as opened blocks, only the first is shown.

    Args:
        graph: The graph.
        shrinking: Whether a group repeats another one also if its sizes are smaller.
    """
    return "".join(f"{line}\n" for line in _lines(graph, shrinking))


def _lines(graph: fx.Graph, shrinking: bool) -> list[str]:
    batched = descendants(*graph.find_nodes(op="placeholder"))  # everything that depends on the images
    nodes = list(graph.nodes)
    repeats = _Repeats(graph, shrinking)
    lines: list[str] = []
    start = 0
    while start < len(nodes):
        length, count = _chain_length(nodes, start), 0
        if length < 3:
            length, count = repeats.at(start)
        lines.extend(_chained(nodes[start : start + length], batched))
        if count:
            last = nodes[start + length * (count + 1) - 1]
            shape = "" if shape_of(last) == shape_of(nodes[start + length - 1]) else _shape(last, batched)
            lines.append(f"# and {count} alike, up to {last.name}{shape}")
        start += length * (count + 1)
    return lines


def _chain_length(nodes: Sequence[fx.Node], start: int) -> int:
    end = start + 1
    while end < len(nodes) and _continues(nodes[end - 1], nodes[end]):
        end += 1
    return end - start


class _Repeats:
    """Finds groups of nodes that repeat each other."""

    def __init__(self, graph: fx.Graph, shrinking: bool) -> None:
        self._nodes = list(graph.nodes)
        self._place = {node: index for index, node in enumerate(self._nodes)}
        self._shrinking = shrinking

    def at(self, start: int) -> tuple[int, int]:
        """Length of the repeated group at `start` and the number of its repetitions; (1, 0) if there is none."""
        for length in range(_MIN_GROUP, min(_MAX_GROUP, (len(self._nodes) - start) // 2) + 1):
            count = 0
            while start + length * (count + 2) <= len(self._nodes) and self._alike(start, length, length * (count + 1)):
                count += 1
            if count:
                return length, count
        return 1, 0

    def _alike(self, start: int, length: int, distance: int) -> bool:
        """Whether the group of nodes at `start` and the group `distance` nodes later do the same to the same inputs.

        Two inputs are the same if they are one node, or stand at the same place of their groups. An input from outside the
        first group corresponds to the last node before the later group.
        """
        place = self._place

        def same(first: fx.Node, later: fx.Node) -> bool:
            entered = place[first] < start and place[later] == start + distance - 1
            return first is later or place[first] + distance == place[later] or entered

        for first, later in zip(self._nodes[start : start + length], self._nodes[start + distance :], strict=False):
            if first.op != later.op or _stem(first.target) != _stem(later.target) or not self._fits(first, later):
                return False
            inputs = first.all_input_nodes, later.all_input_nodes
            if len(inputs[0]) != len(inputs[1]) or not all(map(same, *inputs)):
                return False
            plain = [fx.map_arg((node.args, node.kwargs), lambda _: None) for node in (first, later)]
            if plain[0] != plain[1]:
                return False
        return True

    def _fits(self, first: fx.Node, later: fx.Node) -> bool:
        """Whether the shapes are equal, or the later one is smaller where that is allowed."""
        shapes = shape_of(first) or (), shape_of(later) or ()
        if len(shapes[0]) != len(shapes[1]):
            return False
        return all(b == a or (b < a and self._shrinking) for a, b in zip(*shapes, strict=True))


def _stem(target: Any) -> Any:
    """The name of a module or parameter without its numbers."""
    return re.sub(r"\d+", "", target) if isinstance(target, str) else target


def _chained(nodes: Sequence[fx.Node], batched: dict[fx.Node, None]) -> list[str]:
    chain: list[fx.Node] = []
    lines: list[str] = []
    for node in [*nodes, None]:
        if node is not None and (not chain or _continues(chain[-1], node)):
            chain.append(node)
            continue
        lines.extend([_chain_line(chain, batched)] if len(chain) > 2 else [_line(n, batched) for n in chain])
        chain = [node] if node is not None else []
    return lines


def _continues(before: fx.Node, node: fx.Node) -> bool:
    """Whether `node` continues a chain of like modules."""
    if before.op != "call_module" or node.op != "call_module" or node.args != (before,) or node.kwargs:
        return False
    (stem, number), (next_stem, next_number) = (_numbered(cast(str, n.target)) for n in (before, node))
    return stem == next_stem and next_number == number + 1 and shape_of(before) == shape_of(node) and len(before.users) == 1


def _numbered(target: str) -> tuple[str, int]:
    match = re.fullmatch(r"(.*?)(\d+)", target)
    return (match[1], int(match[2])) if match else (target, -1)


def _chain_line(chain: list[fx.Node], batched: dict[fx.Node, None]) -> str:
    first, last = chain[0], chain[-1]
    inputs = ", ".join(_argument(arg) for arg in first.args)
    return f"{first.name} ... {last.name} = {first.target} ... {last.target}({inputs}){_shape(last, batched)}"


def _line(node: fx.Node, batched: dict[fx.Node, None]) -> str:
    arguments = [_argument(arg) for arg in node.args]
    arguments += [f"{key}={_argument(value)}" for key, value in node.kwargs.items()]
    inputs = ", ".join(arguments)
    match node.op:
        case "placeholder":
            text = f"{node.name} = input"
        case "get_attr":
            text = f"{node.name} = self.{node.target}"
        case "output":
            return f"return {inputs}"
        case "call_method":
            text = f"{node.name} = {arguments[0]}.{node.target}({', '.join(arguments[1:])})"
        case "call_module":
            text = f"{node.name} = {node.target}({inputs})"
        case _:
            text = f"{node.name} = {_function_name(node.target)}({inputs})"
    return text + _shape(node, batched)


def _argument(value: Any) -> str:
    if isinstance(value, tuple | list):
        inner = ", ".join(_argument(item) for item in cast("list[Any]", value))
        return (
            f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(cast('tuple[Any, ...]', value)) == 1 else ''})"
        )
    if isinstance(value, slice):
        parts = (value.start, value.stop) if value.step is None else (value.start, value.stop, value.step)
        return ":".join("" if part is None else _argument(part) for part in parts)
    return repr(value)


def _function_name(function: Any) -> str:
    module = str(getattr(function, "__module__", "") or "")
    short = {"_operator": "operator", "builtins": "", "torch._C._nn": "torch.nn.functional"}
    module = short.get(module, module)
    if module.startswith("torch._"):
        module = "torch"
    elif module.startswith("papr_fx.ops."):
        module = "papr_fx"
    return f"{module}.{function.__name__}" if module else function.__name__


def _shape(node: fx.Node, batched: dict[fx.Node, None]) -> str:
    shape = shape_of(node)
    if shape is None:
        return f"  # {node.meta['value']}" if "value" in node.meta and node not in batched else ""
    sizes = ["B" if axis == 0 and size == TRACED_BATCH and node in batched else str(size) for axis, size in enumerate(shape)]
    return f"  # ({', '.join(sizes)})"
