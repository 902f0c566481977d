"""What the nodes that passes insert are for: a tag in `node.meta`, which copies of a graph keep.

Names are for readers. A user's module may be called `papr_keep` too, so nothing is looked up by a node's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import cast

from torch import fx


@dataclass(frozen=True)
class Role:
    """What a node is for.

    Attributes:
        kind: The kind of node. The passes define kinds.
        number: Which of several: the choice of positions, or the reduction, that it belongs to.
    """

    kind: Enum
    number: int = 0


def tag(node: fx.Node, kind: Enum, number: int = 0) -> fx.Node:
    """Notes what `node` is for, and returns it."""
    node.meta["role"] = Role(kind, number)
    return node


def has_role(node: fx.Node, kind: Enum) -> bool:
    """Whether `node` is of that kind."""
    role = node.meta.get("role")
    return isinstance(role, Role) and role.kind is kind


def number_of(node: fx.Node) -> int:
    """The number of a node that was tagged."""
    return cast(Role, node.meta["role"]).number


def find(graph: fx.Graph, kind: Enum, number: int = 0) -> fx.Node:
    """The node of that role.

    Raises:
        LookupError: The graph has none.
    """
    for node in graph.nodes:
        if node.meta.get("role") == Role(kind, number):
            return node
    raise LookupError(f"the graph has no node for {kind.value}, number {number}")


def find_all(graph: fx.Graph, kind: Enum) -> list[fx.Node]:
    """All nodes of a kind, in the order in which they run."""
    return [node for node in graph.nodes if has_role(node, kind)]
