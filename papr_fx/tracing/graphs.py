"""What a traced graph says of its values, and parts of it: shapes, what depends on what, cuts."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, fx, nn

from ..errors import TraceError, first_line
from .fakes import TRACED_BATCH, fake_like, faking


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The shape recorded for a node whose value is one tensor, else None."""
    return cast("tuple[int, ...] | None", node.meta.get("shape"))


def ancestors(node: fx.Node) -> dict[fx.Node, None]:
    """`node` and all that it is computed from, latest first."""
    found = {node: None}
    for candidate in reversed(node.graph.nodes):
        if candidate in found:
            found.pop(candidate)
            found[candidate] = None
            found.update(dict.fromkeys(n for n in candidate.all_input_nodes if n not in found))
    return found


def descendants(*nodes: fx.Node) -> dict[fx.Node, None]:
    """`nodes`, of one graph, and all that is computed from any of them, earliest first."""
    found = dict.fromkeys(nodes)
    for node in nodes[0].graph.nodes:
        if not found.keys().isdisjoint(node.all_input_nodes):
            found[node] = None
    return found


def annotate(node: fx.Node, value: object) -> None:
    """Records shape and dtype of a node's value: plain data, which survives copies of the graph."""
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

    `root` should be a clone: a module that caches what it computes would keep fake tensors.

    Raises:
        TraceError: A node refuses its inputs.
    """
    mode, fake = fake_like(images, batch)
    with faking(mode):
        _Annotate(root, graph=graph).run(fake)


def cut(root: nn.Module, graph: fx.Graph, *outputs: fx.Node) -> fx.GraphModule:
    """A graph module over the modules of `root` that computes `outputs` alone: one value, or a tuple of several."""
    needed: dict[fx.Node, None] = {}
    for node in outputs:
        needed.update(ancestors(node))
    part = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in needed or node.op == "placeholder":
            copied[node] = part.node_copy(node, lambda n: copied[n])
    part.output(copied[outputs[0]] if len(outputs) == 1 else tuple(copied[node] for node in outputs))
    return fx.GraphModule(root, part)


class _Annotate(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except Exception as error:
            inputs = ", ".join(f"{m.name} {shape_of(m)}" for m in n.all_input_nodes)
            raise TraceError(f"`{n.target}` refused {inputs}: {first_line(error)}", str(n.target)) from error
        annotate(n, value)
        return value


def remove_dead_code(graph: fx.Graph) -> None:
    """Removes what leads to no output; a method such as `add_` may be called for what it does to its receiver."""
    graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure() or is_in_place(node))


def fixed_value(node: fx.Node) -> object:
    """What Python could read of a node's recorded value: a number, a length; None where that is nothing of size."""
    if "parts" in node.meta:
        return len(node.meta["parts"])
    return node.meta.get("value", (shape_of(node) or (None,))[0])


def is_in_place(node: fx.Node) -> bool:
    """Whether a node is a method such as `add_`, whose result a statement may discard."""
    target = str(node.target)
    return node.op == "call_method" and target.endswith("_") and not target.endswith("__")
