"""Splits a linear layer that makes queries, keys and values where queries of some rows alone are read.

Before:
    qkv     = layer(normed)                                          # (B, N, 3C)
    queries, keys, values = qkv.reshape(B, N, 3, heads, D).permute(2, 0, 3, 1, 4)
    rows    = queries.narrow(-2, 0, 1)                               # (B, heads, 1, D)
    mixed   = scaled_dot_product_attention(rows, keys, values)

Becomes:
    papr_rows_0    = normed.narrow(-2, 0, 1)                         # (B, 1, C)
    papr_queries_0 = linear_columns(papr_rows_0, layer, 0, C)        # (B, 1, C)
    papr_others_0  = linear_columns(normed, layer, C, 3C)            # (B, N, 2C)
    queries        = split_columns(papr_queries_0, 0, (heads, D), (0, 2, 1, 3))
    keys           = split_columns(papr_others_0, 0, (heads, D), (0, 2, 1, 3))
    values         = split_columns(papr_others_0, C, (heads, D), (0, 2, 1, 3))
    mixed          = scaled_dot_product_attention(queries, keys, values)

Because: each output of a linear layer has a row of the weight to itself, and weights can be sliced without a copy. The layer
stays where it is, with its parameters. In ViT-B at half of its tokens this is 0.6 % of all work.

Left alone:
    1. A layer that is no plain `nn.Linear`, as an adapted or quantised one, or that runs hooks. One that becomes such later is
       asked for all of its outputs.
    2. Queries that are no neighbouring outputs, or lie between keys and values; and whatever else reads all rows of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from ..dataflow.columns import Columns, columns_of, origin_of
from ..ops import linear_columns, split_columns
from ..tracing.checkpoints import lay_inside, regions_of
from ..tracing.graphs import nodes_by_name, shape_of


@dataclass(frozen=True)
class SplitSite:
    """A layer to split. Nodes are stored by name, so that it holds for copies of the graph.

    Attributes:
        layer: The node that calls it.
        target: Its qualified name.
        queries: The value of which rows alone are read, and its columns.
        others: The values of which all rows are read, each with its columns.
    """

    layer: str
    target: str
    queries: tuple[str, Columns]
    others: tuple[tuple[str, Columns], ...]

    @property
    def rest(self) -> tuple[int, int]:
        """The first of the columns of which all rows are read, and their end."""
        return min(columns.start for _, columns in self.others), max(columns.stop for _, columns in self.others)


def find_site(root: nn.Module, queries: fx.Node, axis: int) -> SplitSite | None:
    """Finds the layer behind a value of which rows alone are read; None if it stays whole.

    Args:
        root: The modules that the graph calls.
        queries: The value.
        axis: Its axis of rows, counted from the end.
    """
    layer = origin_of(queries)
    if layer.op != "call_module" or len(layer.args) != 1 or layer.kwargs:
        return None
    if type(root.get_submodule(str(layer.target))) is not nn.Linear:
        return None
    columns = columns_of(layer, queries)
    if queries not in columns or columns[queries].order.index(1) - len(shape_of(queries) or ()) != axis:
        return None
    others = tuple((node.name, found) for node, found in columns.items() if node is not queries)
    site = SplitSite(layer.name, str(layer.target), (queries.name, columns[queries]), others)
    return site if others and (site.rest[1] <= columns[queries].start or site.rest[0] >= columns[queries].stop) else None


def rewrite(graph: fx.Graph, site: SplitSite, number: int, rows_of: Callable[[fx.Node, int, fx.Node], fx.Node]) -> fx.Node:
    """Splits a layer, and returns the queries of the rows that are read.

    Args:
        graph: The graph to change.
        site: The layer.
        number: Which one it is.
        rows_of: Inserts the rows of a value on an axis before a node.
    """
    nodes = nodes_by_name(graph)
    layer = nodes[site.layer]
    given = layer.args[0]
    assert isinstance(given, fx.Node)
    rows = rows_of(given, -2, layer)

    def create(op: str, target: str | Callable[..., Any], *arguments: Any, name: str) -> fx.Node:
        return lay_inside(graph.create_node(op, target, arguments, name=name), regions_of(layer))

    def computed(value: fx.Node, columns: tuple[int, int], name: str) -> fx.Node:
        module = create("get_attr", site.target, name=f"{name}_layer")
        return create("call_function", linear_columns, value, module, *columns, name=name)

    with graph.inserting_before(layer):
        span = site.queries[1].start, site.queries[1].stop
        some = computed(rows, span, f"papr_queries_{number}")
        rest = computed(given, site.rest, f"papr_others_{number}")
        split: dict[str, fx.Node] = {}
        for name, columns in (site.queries, *site.others):
            source, first = (some, span[0]) if name == site.queries[0] else (rest, site.rest[0])
            place = source, columns.start - first, columns.sizes, columns.order
            split[name] = create("call_function", split_columns, *place, name=f"papr_split_{number}_{len(split)}")
    for name, node in split.items():
        nodes[name].replace_all_uses_with(node)
    return split[site.queries[0]]
