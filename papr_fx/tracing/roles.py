"""What the nodes that passes insert are for: a tag in `node.meta`, which copies of a graph keep.

Names are for readers. A user's module may be called `papr_keep` too, so nothing is looked up by a node's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import fx


class Kind(Enum):
    """The kinds of node that are looked up later."""

    MAP = "the saliency map of the proposal network"
    PSM = "the map, resized to a grid"
    KEEP = "the indices that are kept of a grid"
    TOKENS = "the kept tokens"
    DENSE_COUNT = "the number of tokens of the dense stream"
    CHANNELS_LAST = "the images in channels-last memory"
    MATCH = "which tokens a block merges"
    REDUCED = "the tokens after a reduction"


@dataclass(frozen=True)
class Role:
    """What a node is for.

    Attributes:
        kind: The kind.
        number: Which of several: the choice of positions, or the reduction, that it belongs to.
    """

    kind: Kind
    number: int = 0


def tag(node: fx.Node, kind: Kind, number: int = 0) -> fx.Node:
    """Notes what `node` is for, and returns it."""
    node.meta["role"] = Role(kind, number)
    return node


def has_role(node: fx.Node, kind: Kind) -> bool:
    """Whether `node` is of that kind."""
    role = node.meta.get("role")
    return isinstance(role, Role) and role.kind is kind


def find(graph: fx.Graph, kind: Kind, number: int = 0) -> fx.Node:
    """The node of that role.

    Raises:
        LookupError: The graph has none.
    """
    for node in graph.nodes:
        if node.meta.get("role") == Role(kind, number):
            return node
    raise LookupError(f"the graph has no node for {kind.value}, number {number}")


def find_all(graph: fx.Graph, kind: Kind) -> list[fx.Node]:
    """All nodes of a kind, in the order in which they run."""
    return [node for node in graph.nodes if has_role(node, kind)]
