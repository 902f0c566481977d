"""Computes the rows of tokens that are read later, and no others: in most ViTs the class token's, in the last block.

Before:
    stream = blocks.10(...)                                      # (B, N, C)
    normed = blocks.11.norm1(stream)
    mixed  = scaled_dot_product_attention(queries, keys, values) # (B, heads, N, D)
    tokens = stream + project(mixed)                             # (B, N, C)
    out    = tokens + mlp(tokens)
    logits = head(norm(out)[:, 0])

Becomes:
    papr_rows_0 = queries.narrow(-2, 0, 1)                       # (B, heads, 1, D)
    mixed       = scaled_dot_product_attention(papr_rows_0, keys, values)
    papr_rows_1 = stream.narrow(-2, 0, 1)                        # (B, 1, C)
    tokens      = papr_rows_1 + project(mixed)                   # (B, 1, C)
    out         = tokens + mlp(tokens)
    logits      = head(norm(out)[:, 0])

Because: behind the last attention every operation treats each token independently, and an attention answers each query
independently. So rows that nobody reads need not be computed, and the others stay what they are. Prefix tokens are the first
rows whatever was dropped, so the rows are a static slice. In ViT-B at half of its tokens this is 6 % of all work.

Left alone:
    1. Tokens that are averaged, pooled by an attention of its own queries, or returned: all rows are read.
    2. What mixes rows, and everything in front of it: it is read whole. Only modules of the blocks are traced through for this.
    3. A node that changes its argument in place, and rows that something computes with as a number.
    4. A reduction of tokens, which needs all of them.
    5. A slice of a value that stays whole: it takes its rows itself.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx, nn

from ..dataflow.arguments import Argument, Rows, filled
from ..dataflow.read_rows import RowReader, RowsRead, find_rows_read
from ..dataflow.row_probe import RowProbe
from ..tracing.blocks import block_of, is_inside
from ..tracing.checkpoints import Region, lay_inside, regions_of
from ..tracing.graphs import called, descendants, leaves_of, nodes_by_name, shape_of
from ..tracing.roles import tag
from ..tracing.trace import OpenError
from . import split_layers
from .kinds import Kind
from .prune_tokens import TokenSite
from .split_layers import SplitSite

_TAKES_SLICE = frozenset({"getitem", "narrow", "select"})


@dataclass(frozen=True)
class NarrowSite:
    """A node that gets rows of some arguments. Nodes are stored by name, so that it holds for copies of the graph.

    Attributes:
        node: Its name.
        arguments: The arguments.
        narrowed: Whether its own value then holds these rows only.
        place: The place of the number of rows among its sizes, if it is a reshape.
    """

    node: str
    arguments: tuple[Argument, ...]
    narrowed: bool
    place: int | None


@dataclass(frozen=True)
class Narrowing:
    """Where only some rows are computed.

    Attributes:
        sites: The nodes, in order.
        rows: How many rows are computed there: the first ones.
        block: Qualified name of the block from which on.
        reason: Why nothing is narrowed; empty if something is.
        splits: The layers of which some outputs are computed for these rows only.
    """

    sites: tuple[NarrowSite, ...] = ()
    rows: int = 0
    block: str = ""
    reason: str = ""
    splits: tuple[SplitSite, ...] = ()


def find_sites(
    root: nn.Module, site: TokenSite, blocks: tuple[str, ...], whole: Collection[str], opened: Collection[str]
) -> Narrowing:
    """Finds the rows that are read, and the nodes of which they are enough.

    Args:
        root: A scratch copy of the modules that the graph calls.
        site: The token stream of a traced graph. The graph is not changed.
        blocks: Qualified names of the trunk's blocks.
        whole: Names of further values that stay whole.
        opened: Qualified names of the modules that may be traced through; others may be asked for.

    Raises:
        OpenError: Modules must be traced through first.
    """
    if not site.rows.prefix:
        return Narrowing(reason="there are no tokens in front of the patches")
    nodes = nodes_by_name(site.stream.graph)
    barriers = {nodes[name]: "is where tokens become fewer" for name in whole}
    reason = ""
    for count in range(1, site.rows.prefix + 1):
        rows = Rows(count, site.rows.count)
        found = find_rows_read(RowProbe(root, rows), site.stream, rows, barriers)
        closed = [node for node in found.stopped if _can_open(node, root, blocks)]
        if asked := {str(node.target) for node in closed} - {*opened}:
            raise OpenError(asked, f"`{min(asked)}` cannot be traced through")
        inside = [node for node in nodes.values() if found.holds_rows(node) and _in_block(node, blocks)]
        if inside:
            readers = [found.readers[node] for node in nodes.values() if node in found.readers]
            sites = tuple(_site(reader) for reader in readers if not _is_slice(reader, found))
            block = block_of(inside[0], blocks) or str(inside[0].target)
            return Narrowing(sites, count, block, splits=_splits(root, found, site.stream))
        reason = _reason(found, reason)
    return Narrowing(reason=reason)


def rewrite(graph: fx.Graph, found: Narrowing) -> None:
    """Inserts the slices, before the nodes that get them."""
    nodes = nodes_by_name(graph)
    narrowed = {site.node for site in found.sites if site.narrowed}
    slices: dict[tuple[fx.Node, int, tuple[Region, ...]], fx.Node] = {}

    def rows_of(value: fx.Node, axis: int, user: fx.Node) -> fx.Node:
        key = value, axis, regions_of(user)
        if key not in slices:
            with graph.inserting_before(user):
                name = f"papr_rows_{len(slices)}"
                made = graph.create_node("call_method", "narrow", (value, axis, 0, found.rows), name=name)
            slices[key] = tag(lay_inside(made, regions_of(user)), Kind.ROWS, len(slices))
        return slices[key]

    for number, split in enumerate(found.splits):
        narrowed.add(split_layers.rewrite(graph, split, number, rows_of).name)
    replaced = {split.queries[0] for split in found.splits}
    for site in found.sites:
        if site.node in replaced:
            continue
        user = nodes[site.node]
        leaves = leaves_of((user.args, user.kwargs))
        for place, axis in site.arguments:
            value = leaves[place]
            assert isinstance(value, fx.Node)
            if value.name not in narrowed:
                leaves[place] = rows_of(value, axis, user)
        if site.place is not None:
            leaves[1 + site.place] = found.rows
        if called(user) == "view" and user.op == "call_method":  # of a slice, which is not contiguous
            user.target = "reshape"
        user.args, user.kwargs = filled(user, leaves)


def _site(reader: RowReader) -> NarrowSite:
    return NarrowSite(reader.node.name, reader.arguments, reader.axis is not None, reader.place)


def _is_slice(reader: RowReader, found: RowsRead) -> bool:
    """Whether a node takes a slice itself, of a value that stays whole: one in front of it would spare nothing."""
    values = leaves_of((reader.node.args, reader.node.kwargs))
    return called(reader.node) in _TAKES_SLICE and not any(
        isinstance(value := values[place], fx.Node) and found.holds_rows(value) for place, _ in reader.arguments
    )


def _splits(root: nn.Module, found: RowsRead, stream: fx.Node) -> tuple[SplitSite, ...]:
    """The layers that make values of which rows alone are read, together with others."""
    nodes, later = nodes_by_name(stream.graph), list(descendants(stream))[1:]
    axes = found.first_rows()
    sites = (split_layers.find_site(root, value, axes[value]) for value in later if value in axes)
    first: dict[str, SplitSite] = {}
    for site in sites:
        if site is not None and nodes[site.layer] in later:
            first.setdefault(site.layer, site)
    return tuple(first.values())


def _in_block(node: fx.Node, blocks: Collection[str]) -> bool:
    inside = block_of(node, blocks) is not None
    return inside or (node.op == "call_module" and any(is_inside(str(node.target), block) for block in blocks))


def _can_open(node: fx.Node, root: nn.Module, blocks: Collection[str]) -> bool:
    """Whether a node calls a module of a block whose code may be traced through."""
    if node.op != "call_module" or not _in_block(node, blocks):
        return False
    module = root.get_submodule(str(node.target))
    own = type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential | nn.ModuleList)
    return not own and not isinstance(module, torch.jit.ScriptModule)


def _reason(found: RowsRead, before: str) -> str:
    """Why no node in a block may get rows only."""
    if found.stopped:
        node, why = next(iter(found.stopped.items()))
        return f"`{node.target if node.op == 'call_module' else node.name}` {why}"
    if not found.whole:
        return before
    node, value = found.whole[0]
    if node.op == "output":
        return f"all rows of `{value.name}` {shape_of(value)} are returned"
    return f"`{node.target if node.op == 'call_module' else node.name}` reads all rows of `{value.name}`"
