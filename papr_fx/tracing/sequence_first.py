"""Blocks that take tokens as (N, B, C), as PyTorch's transformer does by default: the graph gets values (B, N, C) beside them.

Before:
    block  = blocks.0(tokens)                       # (N, B, C)

Becomes:
    tokens_batch_first = tokens.transpose(0, 1)     # (B, N, C): here positions are gathered
    tokens_again       = tokens_batch_first.transpose(0, 1)
    block              = blocks.0(tokens_again)

The same pair follows the last block. Both are views, which a compiler removes.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from .blocks import block_calls
from .fakes import TRACED_BATCH
from .graphs import shape_of


def add_batch_first(graph: fx.Graph, blocks: Collection[str]) -> None:
    """Adds the values (B, N, C) to a traced graph, before the first block and after the last, if its tokens are (N, B, C).

    Args:
        graph: The graph. It is changed in place.
        blocks: Qualified names of the trunk's blocks.
    """
    found = [(stream, nodes[-1]) for _, nodes in block_calls(graph, blocks) if (stream := _sequence(nodes)) is not None]
    if found:
        _transposed_twice(found[0][0])
        _transposed_twice(found[-1][1])


def batch_first(node: fx.Node) -> fx.Node:
    """The value (B, N, C) that `add_batch_first` put before tokens (N, B, C); any other node as it is."""
    return node.all_input_nodes[0] if node.meta.get("again") else node


def _sequence(block: list[fx.Node]) -> fx.Node | None:
    """The tokens (N, B, C) that a block maps to as many."""
    shape = shape_of(block[-1])
    if shape is None or len(shape) != 3 or shape[1] != TRACED_BATCH or shape[0] == TRACED_BATCH:
        return None
    inputs = dict.fromkeys(n for node in block for n in node.all_input_nodes if n not in block)
    return next((node for node in inputs if shape_of(node) == shape), None)


def _transposed_twice(node: fx.Node) -> None:
    count, batch, channels = shape_of(node) or (0, 0, 0)
    graph = node.graph
    with graph.inserting_after(node):
        first = graph.create_node("call_method", "transpose", (node, 0, 1), name=f"{node.name}_batch_first")
    with graph.inserting_after(first):
        again = graph.create_node("call_method", "transpose", (first, 0, 1), name=f"{node.name}_again")
    for made, shape in ((first, (batch, count, channels)), (again, (count, batch, channels))):
        made.meta |= {"shape": shape, "dtype": node.meta.get("dtype"), "inside": ()}
    again.meta["again"] = True
    node.replace_all_uses_with(again, delete_user_cb=lambda user: user not in (first, again))
