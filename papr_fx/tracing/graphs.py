"""Questions about a graph: shapes, what depends on what, whether two are equal; and parts cut out of it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, cast

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from ..errors import TraceError, first_line
from .checkpoints import regions_of
from .fakes import TRACED_BATCH, fake_images, faking
from .results import LikeResults, ReshapedError, Result, is_in_place
from .sources import GraphModule


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The recorded shape of a node whose value is one tensor, otherwise None."""
    return cast("tuple[int, ...] | None", node.meta.get("shape"))


def nodes_by_name(graph: fx.Graph) -> dict[str, fx.Node]:
    """The nodes of a graph by name. Names hold for copies of the graph too, so sites store names."""
    return {node.name: node for node in graph.nodes}


def called(node: fx.Node) -> str:
    """Name of the method or function that a node calls; empty for any other node."""
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


def leaves_of(arguments: Any) -> list[object]:
    """The arguments of a node without their containers. `fx` keeps a dtype and a device as they are."""
    found: list[object] = []

    def add(leaf: Any) -> Any:
        found.append(leaf)
        return leaf

    map_aggregate(arguments, add)
    return found


def same_graph(a: fx.Graph, b: fx.Graph) -> bool:
    """Whether two graphs have equal nodes: names, targets, arguments, shapes and checkpoints."""
    return [_structure(node) for node in a.nodes] == [_structure(node) for node in b.nodes]


def _structure(node: fx.Node) -> tuple[Any, ...]:
    arguments = fx.map_arg((node.args, node.kwargs), lambda n: _Named(n.name))  # no string argument is equal to it
    return node.name, node.op, node.target, repr(arguments), shape_of(node), regions_of(node)


class _Named(NamedTuple):
    """A node among arguments."""

    name: str


def attribute(root: nn.Module, name: str) -> Any:
    """The value of a dotted attribute of `root`."""
    path, _, leaf = name.rpartition(".")
    return getattr(root.get_submodule(path), leaf)


def ancestors(node: fx.Node) -> dict[fx.Node, None]:
    """`node` and everything it is computed from, latest first."""
    found: dict[fx.Node, None] = {}
    wanted = {node}
    while wanted:
        if node in wanted:
            wanted.remove(node)
            found[node] = None
            wanted.update(node.all_input_nodes)
        node = node.prev
    return found


def descendants(*nodes: fx.Node) -> dict[fx.Node, None]:
    """`nodes`, of one graph, and everything computed from them, earliest first."""
    found = dict.fromkeys(nodes)
    for node in nodes[0].graph.nodes:
        if not found.keys().isdisjoint(node.all_input_nodes):
            found[node] = None
    return found


def annotate(node: fx.Node, value: object) -> None:
    """Records shape and dtype of a node's value in `meta`: plain data, which copies of the graph keep."""
    for key in ("shape", "dtype", "value", "parts"):
        node.meta.pop(key, None)
    if isinstance(value, Tensor):
        node.meta["shape"] = tuple(int(size) for size in value.shape)
        node.meta["dtype"] = value.dtype
    elif isinstance(value, bool | int | float):
        node.meta["value"] = value
    elif isinstance(value, tuple | list) and any(isinstance(part, Tensor) for part in cast("list[Any]", value)):
        parts = cast("list[Any]", value)
        node.meta["parts"] = tuple(tuple(part.shape) if isinstance(part, Tensor) else None for part in parts)


def propagate(root: nn.Module, graph: fx.Graph, images: Tensor, *, batch: int = TRACED_BATCH) -> None:
    """Runs `graph` over the modules of `root` on fake images and records every node's shape.

    `root` should be a scratch copy: a module that caches what it computes would keep fake tensors.

    Raises:
        TraceError: A node refuses its inputs.
    """
    for shares in (True, False):
        results = LikeResults(root, "values", shares=shares)
        fake = fake_images(results.mode, images, batch)
        with suppress(ReshapedError), faking(results.mode, root):
            _Annotate(root, graph, results).run(fake)
            return


def cut(root: nn.Module, graph: fx.Graph, *outputs: fx.Node) -> fx.GraphModule:
    """A graph module over the modules of `root` that computes only `outputs`: one value, or a tuple of several."""
    needed: dict[fx.Node, None] = {}
    for node in outputs:
        needed.update(ancestors(node))
    part = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in needed or node.op == "placeholder":
            copied[node] = part.node_copy(node, lambda n: copied[n])
    part.output(copied[outputs[0]] if len(outputs) == 1 else tuple(copied[node] for node in outputs))
    return GraphModule(root, part)


class Run(fx.Interpreter):
    """Runs a graph as `fx.Interpreter` does, but keeps to itself which node runs: PyTorch tells it to all threads."""

    @contextmanager
    def _set_current_node(self, node: fx.Node) -> Generator[None]:
        yield


class _Annotate(Run):
    def __init__(self, root: nn.Module, graph: fx.Graph, results: LikeResults) -> None:
        super().__init__(root, graph=graph)
        self._results = results
        self.extra_traceback = False  # a failure is a normal result here

    def run_node(self, n: fx.Node) -> Any:
        value = self._results.of(n, self.env, lambda: Result(self._run(n), {})).value
        annotate(n, value)
        return value

    def _run(self, node: fx.Node) -> Any:
        try:
            return super().run_node(node)
        except Exception as error:
            inputs = ", ".join(f"{m.name} {shape_of(m)}" for m in node.all_input_nodes)
            raise TraceError(f"`{node.target}` refused {inputs}: {first_line(error)}", str(node.target)) from error


def remove_dead_code(graph: fx.Graph, keeps: Callable[[fx.Node], bool] = lambda node: False) -> None:
    """Removes nodes that lead to no output. Methods such as `add_` stay: they may be called for what they change.

    Args:
        graph: The graph.
        keeps: Tells of a node whether it stays too.
    """
    graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure() or is_in_place(node) or keeps(node))


def fixed_value(node: fx.Node) -> object:
    """What Python code could read from a node's recorded value: a number or a length; None if it is neither."""
    if "parts" in node.meta:
        return len(node.meta["parts"])
    return node.meta.get("value", (shape_of(node) or (None,))[0])
