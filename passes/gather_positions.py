"""Gathers tables where they meet the pruned tokens: rotary tables, relative-position biases, masks.

Before:
    table  = rope(...)                                 # (n, D), one row per patch
    turned = queries * table                           # (B, H, n, D)

Becomes:
    papr_patches    = kept_patches(papr_keep, prefix)  # (B, k): the kept patches, without the prefix (and the suffix)
    papr_position_0 = gather_positions(table, papr_patches, [2], 4)  # (B, 1, k, D)
    turned          = queries * papr_position_0        # (B, H, k, D)

Because: with k tokens the operation fails, as its operands differ in length. An operand that still has its dense length holds
an entry per position, so it is gathered by the indices of the tokens: along whichever axes make the operation run again.
Tables that several blocks compute alike are gathered once. That the right axis was gathered is for the proof to show: with all
positions in random order the rewritten graph must give the model's output.

Three more things are repaired:
    - A block numbers positions by the token count (`torch.arange(x.shape[1])`): it gets the dense count, and the kept numbers
      are gathered.
    - A block asks a table for the number of positions, to tell other tokens from patches: it gets the kept count.
    - A reshape after the blocks lays the patches out as their grid, (B, h, w, C), which is only pooled: the kept ones become a
      grid of k rows and one column. (Inside a block such a reshape is refused; where more is done with the grid, see
      `restore_places`.)

Left alone:
    1. A module that fails, or numbers positions itself: it must be traced through first (`OpenError`).
    2. An operation that fails although no operand has the dense length: a window, a reshape to the grid inside a block.
"""

from __future__ import annotations

import operator

from torch import Tensor, fx, nn

from ..dataflow.layouts import set_grid
from ..dataflow.repairs import Count, Numbering, Repairs, TableSite, View
from ..dataflow.shorter_run import find_repairs
from ..dataflow.token_run import TokenStream
from ..ops import add_quads, gather_positions, kept_patches
from ..ops.rows import Span
from ..tracing.graphs import nodes_by_name
from ..tracing.roles import tag
from .kinds import Kind
from .prune_tokens import TokenSite, patches_of


def find_sites(
    root: nn.Module, site: TokenSite, blocks: tuple[str, ...], images: Tensor, others: tuple[str, ...] = ()
) -> Repairs:
    """Runs the dense graph with some tokens left out, and finds what must change for it to run.

    Args:
        root: A scratch copy of the modules that the graph calls.
        site: Where tokens are dropped in the graph.
        blocks: Qualified names of the blocks.
        images: Images of the traced shape.
        others: Qualified names of other repeated blocks that run on tokens.

    Raises:
        OpenError: A module refuses fewer tokens, or numbers them.
        NoSiteError: An operation refuses fewer tokens, and no gather repairs it.
    """
    return find_repairs(root, TokenStream(site.stream, site.rows, blocks, others), images)


def rewrite(graph: fx.Graph, repairs: Repairs, site: TokenSite, keep: fx.Node, quads: fx.Node | None = None) -> None:
    """Inserts the gathers after `keep`, one per table however many users it has, and the other repairs.

    With a coarse background, `quads` are the patches of each quad: tables get an entry for each, the mean of its patches'.
    """
    nodes = nodes_by_name(graph)
    counted = _kept_by_span(graph, repairs, site, keep)
    patches = site.rows.spans[-1]
    for number, table in enumerate(repairs.tables):
        value = nodes[table.value] if quads is None else _with_quads(nodes, number, table, quads, site.rows.prefix)
        _gather(nodes, number, table, value, counted[table.pick.span])
    for number, view in enumerate(repairs.views):
        _lay_out_column(nodes[view.user], number, view, counted[patches])
    for span in dict.fromkeys(count.span for count in repairs.counts):
        same = [count for count in repairs.counts if count.span == span]
        _count_kept(nodes, same, counted[span], f"papr_{'patch' if span == patches else 'token'}_count")
    if repairs.numberings:
        _number_all(nodes, repairs.numberings, site, keep)


def _kept_by_span(graph: fx.Graph, repairs: Repairs, site: TokenSite, keep: fx.Node) -> dict[Span, fx.Node]:
    """The kept indices, by the tokens that they count: nodes for those that repairs need."""
    patches = site.rows.spans[-1]
    used = {count.span for count in repairs.counts} | {table.pick.span for table in repairs.tables}
    used |= {patches} if repairs.views else set()
    counted = {Span(): keep}
    for span in site.rows.spans:
        if span not in used or span in counted:
            continue
        if span == patches:
            counted[span] = patches_of(graph, site.rows, keep)
        else:
            name = "papr_without_prefix" if span.first else "papr_without_suffix"
            ends = (span.first, span.behind) if span.behind else (span.first,)
            with graph.inserting_after(keep):
                counted[span] = graph.create_node("call_function", kept_patches, (keep, *ends), name=name)
    return counted


def _with_quads(nodes: dict[str, fx.Node], number: int, table: TableSite, quads: fx.Node, prefix: int) -> fx.Node:
    """A table with an entry for each quad."""
    axes, rank, span = table.pick
    arguments = (nodes[table.value], quads, list(axes), rank, (prefix - span.first, span.behind))
    user = nodes[table.users[0][0]]
    with user.graph.inserting_before(user):
        return user.graph.create_node("call_function", add_quads, arguments, name=f"papr_table_{number}")


def _gather(nodes: dict[str, fx.Node], number: int, table: TableSite, value: fx.Node, index: fx.Node) -> None:
    users = [(nodes[user], nodes[read]) for user, read in table.users]
    arguments = (value, index, list(table.pick.axes), table.pick.rank)
    with index.graph.inserting_before(users[0][0]):
        gathered = index.graph.create_node("call_function", gather_positions, arguments, name=f"papr_position_{number}")
    for user, read in users:
        user.replace_input_with(read, gathered)


def _lay_out_column(reshape: fx.Node, number: int, view: View, patches: fx.Node) -> None:
    """Makes a reshape to the grid one to k rows and one column."""
    with reshape.graph.inserting_before(reshape):
        count = reshape.graph.create_node("call_method", "size", (patches, 1), name=f"papr_rows_{number}")
    set_grid(reshape, view.place, (count, *[1] * (view.axes - 1)))


def _count_kept(nodes: dict[str, fx.Node], counts: list[Count], index: fx.Node, name: str) -> None:
    """Replaces sizes by the number of kept indices."""
    with index.graph.inserting_after(index):
        size = index.graph.create_node("call_method", "size", (index, 1), name=name)
    for count in counts:
        nodes[count.size].replace_all_uses_with(size, delete_user_cb=size.__lt__)


def _number_all(nodes: dict[str, fx.Node], numberings: tuple[Numbering, ...], site: TokenSite, keep: fx.Node) -> None:
    """Makes calls number all tokens of the dense stream."""
    graph = keep.graph
    with graph.inserting_before(max(keep, site.stream.next)):
        tokens = graph.create_node("call_method", "size", (site.stream, 1), name="papr_dense_tokens")
        dense = {Span(): tag(tokens, Kind.DENSE_COUNT)}
        for span in site.rows.spans[1:]:
            if any(numbering.span == span for numbering in numberings):
                fewer = (tokens, span.first + span.behind)
                dense[span] = graph.create_node("call_function", operator.sub, fewer, name="papr_dense_patches")
    for numbering in numberings:
        nodes[numbering.call].replace_input_with(nodes[numbering.size], dense[numbering.span])
