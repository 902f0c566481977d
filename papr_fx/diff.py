"""Graphs as text that people review: one line a node, stable between runs and machines."""

from __future__ import annotations

import difflib
import re
from typing import Any, cast

from torch import fx, nn

from .errors import ArgumentError
from .module import PrunedModule, checked_module
from .trace import TRACED_BATCH, ancestors, shape_of, trace


def graph_text(graph: fx.Graph) -> str:
    """The graph as lines `name = operation(inputs)  # shape`; B stands for the batch size.

    A chain of like modules (`blocks.0` to `blocks.11`, each fed by the one before) is one line.
    """
    return "".join(f"{line}\n" for line in _lines(graph))


def graph_diff(model: nn.Module, gm: fx.GraphModule) -> str:
    """The unified diff from the graph of `model`, traced afresh, to that of its rewritten form.

    Args:
        model: The model that was given to `transform`.
        gm: The module that it returned.

    Returns:
        Unified diff text, empty at z=1.

    Raises:
        ArgumentError: `gm` was not transformed, or not from a model such as `model`.
    """
    module = checked_module(gm)
    if type(model).__name__ != module.plan.name:
        raise ArgumentError(f"graph_diff: gm was made of a {module.plan.name}, not of a {type(model).__name__}")
    before = trace(model, module.example(), lambda _, name: name in module.plan.opened, training=module.training).graph
    return _unified(before, module)


def graph_changes(module: PrunedModule) -> str:
    """The same diff from the dense graph that the module keeps."""
    return _unified(module.plan.dense_graph(module.training), module)


def _unified(before: fx.Graph, module: PrunedModule) -> str:
    old, new = (graph_text(graph).splitlines(keepends=True) for graph in (before, module.graph))
    return "".join(difflib.unified_diff(old, new, "dense", f"papr z={module.plan.z:g}", n=2))


def _lines(graph: fx.Graph) -> list[str]:
    batched = _batched(graph)
    chain: list[fx.Node] = []
    lines: list[str] = []
    for node in [*graph.nodes, None]:
        if node is not None and (not chain or _continues(chain[-1], node)):
            chain.append(node)
            continue
        lines.extend([_chain_line(chain, batched)] if len(chain) > 2 else [_line(n, batched) for n in chain])
        chain = [node] if node is not None else []
    return lines


def _continues(before: fx.Node, node: fx.Node) -> bool:
    """Whether `node` is the next of a chain of like modules."""
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
        return ":".join("" if part is None else _argument(part) for part in (value.start, value.stop))
    return repr(value)


def _function_name(function: Any) -> str:
    module = str(getattr(function, "__module__", "") or "")
    short = {"_operator": "operator", "builtins": "", "torch._C._nn": "torch.nn.functional", "papr_fx.ops": "papr_fx"}
    module = short.get(module, "torch" if module.startswith("torch._") else module)
    return f"{module}.{function.__name__}" if module else function.__name__


def _shape(node: fx.Node, batched: dict[fx.Node, None]) -> str:
    shape = shape_of(node)
    if shape is None:
        return f"  # {node.meta['value']}" if "value" in node.meta and node not in batched else ""
    sizes = ["B" if axis == 0 and size == TRACED_BATCH and node in batched else str(size) for axis, size in enumerate(shape)]
    return f"  # ({', '.join(sizes)})"


def _batched(graph: fx.Graph) -> dict[fx.Node, None]:
    """The nodes that depend on the images."""
    images = set(graph.find_nodes(op="placeholder"))
    return {node: None for node in graph.nodes if images & ancestors(node).keys()}
