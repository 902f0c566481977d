"""Where a traced graph calls the blocks of a trunk."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable

from torch import fx

from .graphs import shape_of


def is_inside(name: str, module: str) -> bool:
    """Whether `name` is the qualified name of `module` or of something in it."""
    return f"{name}.".startswith(f"{module}.")


def ancestors_of(names: Iterable[str]) -> set[str]:
    """Qualified names of every module that contains one of `names`, without the model itself."""
    parts = [name.split(".") for name in names]
    return {".".join(part[:depth]) for part in parts for depth in range(1, len(part))}


def block_of(node: fx.Node, blocks: Collection[str]) -> str | None:
    """The block in whose forward a node was recorded."""
    return next((block for block in blocks for name in node.meta["inside"] if is_inside(name, block)), None)


def block_calls(graph: fx.Graph, blocks: Collection[str]) -> list[tuple[str, list[fx.Node]]]:
    """The calls of blocks in order, each with its nodes: one if the block is whole, many if it was traced through."""
    found: list[tuple[str, list[fx.Node]]] = []
    before = None
    for node in graph.nodes:
        name = block_of(node, blocks)
        if name is None and node.op == "call_module" and any(is_inside(block, str(node.target)) for block in blocks):
            name = str(node.target)  # a whole module around blocks
        if name is not None and (name != before or node.target == name):
            found.append((name, []))
        if name is not None:
            found[-1][1].append(node)
        before = name
    return found


def last_tokens(graph: fx.Graph, stream: fx.Node, blocks: Collection[str]) -> fx.Node:
    """The tokens that the last block returns: the last value with the shape of `stream` that a block computes."""
    shape = shape_of(stream)
    for node in reversed(graph.nodes):
        indirect = node.target is operator.getitem or (node.next.meta.get("again") and node.op == "call_method")
        source = node.all_input_nodes[0] if indirect else node  # a block may return a tuple, or (N, B, C)
        if shape_of(node) == shape and (source.target in blocks or block_of(source, blocks)):
            return node
    return stream
