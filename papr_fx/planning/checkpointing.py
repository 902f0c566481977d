"""The code of a graph in which regions are checkpointed: each becomes a function that `torch.utils.checkpoint` calls.

Graph:
    a = ...
    b = ...(a, x)         # both in a region, see `papr_fx.tracing.checkpoints`
    c = ...(b)

Its code:
    def papr_checkpointed_0(x):
        a = ...
        b = ...(a, x)
        return b
    papr_region_0 = torch.utils.checkpoint.checkpoint(papr_checkpointed_0, x, use_reentrant=False)   # or what the model says
    c = ...(papr_region_0)

Because: the graph itself stays flat, so whatever reads or runs it knows nothing of regions. Modules and tensors stay where they
are: a region of modules of its own would change the names of parameters.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.utils.checkpoint import checkpoint

from ..tracing.checkpoints import Region, regions_of

# How the two calls below appear as lines of code.
_BEGIN = re.compile(r"(\w+)(?: : .*)? = \w*_begin_region\((.*?)\)(;.*)?")
_END = re.compile(r"\w+(?: : .*)? = \w*_end_region\((.*?)\)(;.*)?")


def begin_region(*inputs: object) -> Any:
    """Stands in a graph where the function of a region begins. Never called."""
    raise AssertionError(f"a line of code was not replaced, at {inputs}")


def end_region(*outputs: object) -> Any:
    """Stands in a graph where the function of a region ends. Never called."""
    raise AssertionError(f"a line of code was not replaced, at {outputs}")


@dataclass(frozen=True)
class GlobalName:
    """An argument that code reads from a global variable."""

    name: str

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Outline:
    """A graph in which each region lies between its two lines, and is called after them.

    Attributes:
        graph: The graph. It is only good for code.
        places: For each of its nodes, the place of the node of the original graph that it stands for.
        variables: Global variables of its code.
    """

    graph: fx.Graph
    places: list[int]
    variables: dict[str, object]


def is_checkpointed(graph: fx.Graph) -> bool:
    """Whether a graph has regions."""
    return any(regions_of(node) for node in graph.nodes)


def outline(graph: fx.Graph) -> Outline:
    """The outline of a graph with regions. The graph itself stays as it is."""
    writer = _Writer({node: place for place, node in enumerate(graph.nodes)})
    writer.write(list(graph.nodes), 0)
    return Outline(writer.graph, writer.written, writer.variables)


def with_functions(source: str) -> str:
    """The code of an outline with functions for its regions. Lines stay in their places."""
    lines: list[str] = []
    depth = 0
    for line in source.split("\n"):
        code = line.strip()
        if begin := _BEGIN.fullmatch(code):
            lines.append(_indented(line, depth, f"def {begin[1]}({begin[2]}):"))
            depth += 1
        elif end := _END.fullmatch(code):
            lines.append(_indented(line, depth, f"return {end[1]}" if end[1] else "return ()"))
            depth -= 1
        else:
            lines.append(_indented(line, depth, code) if code else line)
    return "\n".join(lines)


def _indented(line: str, depth: int, code: str) -> str:
    return line[: len(line) - len(line.lstrip())] + "    " * depth + code


@dataclass
class _Writer:
    """Writes the nodes of a graph into an outline.

    Attributes:
        place: The nodes of the graph, and their places.
        graph: The outline.
        copies: For nodes of the graph, what holds their values where the outline is being written.
        written: For each node of the outline, the place of the node that it stands for.
        variables: Global variables of its code.
        count: Regions so far.
    """

    place: dict[fx.Node, int]
    graph: fx.Graph = field(default_factory=fx.Graph)
    copies: dict[fx.Node, fx.Node] = field(default_factory=dict[fx.Node, fx.Node])
    written: list[int] = field(default_factory=list[int])
    variables: dict[str, object] = field(default_factory=dict[str, object])
    count: int = 0

    def write(self, nodes: Sequence[fx.Node], depth: int) -> None:
        """Writes nodes that lie in the same `depth` regions.

        Passes put nodes between those of a region. What reads nothing of it comes before it, such as the choice of positions;
        what does belongs to it.
        """
        left = dict.fromkeys(nodes)
        for node in nodes:
            if node not in left:
                continue
            inside = regions_of(node)[depth : depth + 1]
            if not inside:
                self._copy(node)
                del left[node]
                continue
            last = max(self.place[other] for other in left if regions_of(other)[depth : depth + 1] == inside)
            span = [other for other in left if self.place[other] <= last]
            members = _members(span, (*regions_of(node)[:depth], *inside))
            for other in span:
                del left[other]
                if other.op == "get_attr" and other not in members:
                    self._copy(other)
            self.write([other for other in span if other not in members and other not in self.copies], depth)
            if members:
                self._write_region(list(members), inside[0], depth + 1)

    def _copy(self, node: fx.Node) -> None:
        self.copies[node] = copied = self.graph.node_copy(node, lambda n: self.copies[n])
        copied.meta.pop("checkpoints", None)
        self.written.append(self.place[node])

    def _write_region(self, members: Sequence[fx.Node], region: Region, depth: int) -> None:
        number, self.count = self.count, self.count + 1
        known = set(members)
        inputs = list(dict.fromkeys(n for node in members for n in node.all_input_nodes if n not in known))
        outputs = [node for node in members if not known.issuperset(node.users)]
        given = tuple(self.copies[node] for node in inputs)
        function = self._call(begin_region, given, f"papr_checkpointed_{number}", members[0])
        self.write(members, depth)
        self._call(end_region, tuple(self.copies[node] for node in outputs), f"papr_return_{number}", members[-1])
        called = self._call(checkpoint, (function, *given), f"papr_region_{number}", members[-1])
        called.kwargs = {"use_reentrant": False, **{name: self._option(name, value) for name, value in region.options}}
        if not _is_flat(inputs, outputs):
            called.kwargs = {**called.kwargs, "use_reentrant": False}
        if len(outputs) == 1:
            self.copies[outputs[0]] = called
            return
        for index, node in enumerate(outputs):
            self.copies[node] = self._call(operator.getitem, (called, index), node.name, node)

    def _call(self, target: Any, args: tuple[Any, ...], name: str, node: fx.Node) -> fx.Node:
        self.written.append(self.place[node])
        return self.graph.create_node("call_function", target, args, name=name)

    def _option(self, name: str, value: Any) -> Any:
        """An option of `checkpoint` as an argument of a node: functions have no text."""
        if not callable(value):
            return value
        known = [variable for variable, other in self.variables.items() if other is value]
        variable = known[0] if known else f"papr_{name}_{len(self.variables)}"
        self.variables[variable] = value
        return GlobalName(variable)


def _is_flat(inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> bool:
    """Whether no tensor hides in a list or tuple on its way in or out: re-entrant calls would lose its gradient."""
    nested = [*inputs, *outputs] if len(outputs) > 1 else inputs  # a single tuple is the function's result itself
    return not any("parts" in node.meta for node in nested)


def _members(span: Iterable[fx.Node], path: tuple[Region, ...]) -> dict[fx.Node, None]:
    """The nodes of a region: those that were recorded in it, and what reads them up to the last of those.

    Parameters that code outside of it reads too are not: a region need not return them.
    """
    members: dict[fx.Node, None] = {}
    for node in span:
        if regions_of(node)[: len(path)] == path:
            shared = node.op == "get_attr" and any(regions_of(user)[: len(path)] != path for user in node.users)
            if not shared:
                members[node] = None
        elif not members.keys().isdisjoint(node.all_input_nodes):
            members[node] = None
    return members
