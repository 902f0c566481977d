"""Removes some tokens in each block, between attention and MLP: what merging and its peers have in common.

Before:
    mixed  = scaled_dot_product_attention(queries, keys, values)   # a block's attention over (B, N, C) tokens
    tokens = stream + project(mixed)
    out    = tokens + mlp(tokens)

Becomes:
    papr_bias_1   = size_bias(papr_sizes_0, keys)                  # (B, 1, 1, N), from the second reduction on
    mixed         = scaled_dot_product_attention(queries, keys, values, attn_mask=papr_bias_1)
    tokens        = stream + project(mixed)
    papr_tokens_1 = ...                                            # (B, N - r, C), by the reduction, such as `merge_tokens`
    papr_sizes_1  = ...                                            # (B, N - r): how many patches each token stands for
    out           = papr_tokens_1 + mlp(papr_tokens_1)

Because: from the addition to the next attention every operation treats each token independently, and attention takes any
number of them. A token that stands for s patches weights s times as much in attentions and averages (Bolya et al., ICLR 2023,
Sec. 3.2). Then merging equal tokens changes nothing.

Left alone:
    1. A chosen block with several attentions, or with none by `scaled_dot_product_attention` or `nn.MultiheadAttention`.
    2. An attention with a mask or a bias, or a model that uses positions beyond the embedding: a merged token has none.
    3. A skip connection that carries tokens from before the attention's residual addition past it.
    4. A module of torch.nn that attends to the tokens, or averages them, and cannot be traced through.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, cast

from torch import Tensor, fx, nn

from ..dataflow.attentions import Attention, Mean, TokenReaders, as_sdpa, call_arguments, find_readers
from ..dataflow.moves import operands
from ..errors import NoSiteError
from ..ops import TokenRows
from ..ops.reduction import mean_by_size, size_bias
from ..tracing.blocks import block_calls
from ..tracing.graphs import descendants, nodes_by_name, shape_of
from ..tracing.macs import count_macs_by_node
from ..tracing.roles import tag
from .kinds import Kind
from .prune_tokens import TokenSite
from .reduction import Attended, Reduction, State, chosen_blocks
from .schedules import Start, Work, first_excess
from .splice_proposal import Sizes


@dataclass(frozen=True)
class ReductionSite:
    """Where the tokens of a block become fewer. Nodes are stored by name, so that it holds for copies of the graph.

    Attributes:
        block: Qualified name of the block.
        attention: The node of its attention.
        addition: The residual addition after it.
    """

    block: str
    attention: str
    addition: str


@dataclass(frozen=True)
class ReductionSites:
    """What a reduction changes in a graph.

    Attributes:
        sites: Where tokens become fewer, in order.
        attentions: Nodes that attend to tokens that may be fewer.
        means: Nodes that average them.
        work: What follows on each reduction, up to the next.
    """

    sites: tuple[ReductionSite, ...] = ()
    attentions: tuple[Attention, ...] = ()
    means: tuple[Mean, ...] = ()
    work: tuple[Work, ...] = ()


class Remaining(NamedTuple):
    """The tokens before the first reduction.

    Attributes:
        grid: Sizes of the patches' grid, numbers or nodes.
        rows: The tokens before and behind the patches. They stay.
        patches: How many patches there are, on images of the traced shape.
        keep: The node of the kept indices (B, N), where some tokens were dropped.
    """

    grid: Sizes
    rows: TokenRows
    patches: int
    keep: fx.Node | None


def find_sites(
    root: nn.Module, token_site: TokenSite, blocks: tuple[str, ...], reduction: Reduction, images: Tensor
) -> ReductionSites:
    """Finds where tokens can become fewer.

    Args:
        root: A scratch copy of the modules that the graph calls.
        token_site: The token stream of a traced graph. The graph is not changed.
        blocks: Qualified names of the trunk's blocks.
        reduction: Says in which of them.
        images: Images of the traced shape.

    Raises:
        OpenError: Modules must be traced through first.
        NoSiteError: Fewer tokens would not be sound, with the reason.
    """
    graph, rows = token_site.stream.graph, token_site.rows
    calls: dict[str, list[fx.Node]] = {}
    for name, part in block_calls(graph, blocks):  # a block may be called in several parts
        calls.setdefault(name, []).extend(part)
    chosen = chosen_blocks(list(calls), reduction)
    if not chosen:
        return ReductionSites()
    nodes = nodes_by_name(graph)
    start = list(nodes).index(calls[chosen[0]][0].name)
    counts = {rows.cells + rows.others - span.first - span.behind for span in rows.spans}
    seen = find_readers(root, graph, [*nodes.values()][start:], counts, images)
    _check_ends(nodes, seen, counts - {rows.count, rows.cells})
    attentions = [nodes[name] for name, _ in seen.attentions]
    sites = tuple(_site(token_site.stream, block, calls[block], attentions) for block in chosen)
    return ReductionSites(sites, seen.attentions, seen.means, _work(root, graph, sites, seen.attentions, images))


def _work(
    root: nn.Module, graph: fx.Graph, sites: Sequence[ReductionSite], attentions: Sequence[Attention], images: Tensor
) -> tuple[Work, ...]:
    """What follows on each site, from the multiply-accumulates of the dense graph."""
    pairs = {name: _per_pair(call_arguments(nodes_by_name(graph)[name])) for name, _ in attentions}
    macs, nodes = count_macs_by_node(root, graph, images), nodes_by_name(graph)
    names = list(nodes)
    count = (shape_of(nodes[sites[0].addition]) or (0, 0))[1]
    starts = [names.index(site.addition) + 1 for site in sites]
    found: list[Work] = []
    for first, end in zip(starts, [*starts[1:], len(names)], strict=True):
        inside = names[first:end]
        per_pair = sum(pairs.get(name, 0) for name in inside)
        found.append(Work(sum(macs.get(name, 0) for name in inside) / count - per_pair * count, per_pair))
    return tuple(found)


def _per_pair(given: Mapping[str, fx.Node]) -> float:
    """Multiply-accumulates of an attention for each pair of tokens; 0 if its queries are not the tokens."""
    query, key = shape_of(given["query"]) or (0, 0), shape_of(given["key"]) or (0, 0)
    return 2 * prod(query) / query[0] / query[-2] if query[-2] == key[-2] else 0  # twice the width of all heads


def _check_ends(nodes: Mapping[str, fx.Node], seen: TokenReaders, counts: Collection[int]) -> None:
    """Refuses what reads the patches and the tokens of one end alone, which are `counts`: its length would not tell which."""
    read = {name: (nodes[name].all_input_nodes[0], axis) for name, axis in seen.means}
    for name, heads in seen.attentions:
        given = call_arguments(nodes[name])
        read[name] = (given["query"], 1) if heads else (given["key"], -2)
    for name, (value, axis) in read.items():
        if (shape_of(value) or (0, 0))[axis] in counts:
            raise NoSiteError(f"merge: `{name}` reads the patches and the other tokens of one end alone")


def check_amounts(found: ReductionSites, reduction: Reduction, patches: int, z: float) -> None:
    """Refuses a list of numbers of tokens to remove, of which one is more than half of the patches that are left there.

    Raises:
        NoSiteError: It is.
    """
    if isinstance(reduction.r, int):
        return
    if excess := first_excess(reduction.r, patches):
        place, left = excess
        raise NoSiteError(
            f"merge: r={list(reduction.r)} removes {reduction.r[place]} tokens in `{found.sites[place].block}`, which has "
            f"{left} patches left at z={z:g}, and half of them, {left // 2}, can go at most"
        )


def rewrite(graph: fx.Graph, found: ReductionSites, reduction: Reduction, tokens: Remaining) -> None:
    """Reduces the tokens at every site, except where the reduction removes none."""
    amounts = reduction.amounts(Start(tokens.patches, tokens.rows.others), found.work)
    places = {site.addition: place for place, site in enumerate(found.sites) if amounts[place]}
    heads, axes = dict(found.attentions), dict(found.means)
    attended: dict[str, fx.Node] = {}  # each as a call of `scaled_dot_product_attention`
    state, number = State(None, tokens.keep), 0
    prefix, suffix = tokens.rows.prefix, tokens.rows.suffix
    for node in list(graph.nodes):
        if node.name in heads:
            attended[node.name] = attention = as_sdpa(graph, node, heads[node.name])
            if state.sizes is not None and reduction.proportional:
                _weight(graph, attention, state.sizes, (suffix,) if suffix else (), number)
        if node.name in axes and state.sizes is not None:
            _average(node, axes[node.name], state.sizes, suffix)
        if node.name in places:
            before, place = set(graph.nodes), places[node.name]
            attention = attended[found.sites[place].attention]
            queries, keys, values = cast("tuple[fx.Node, ...]", attention.args[:3])
            scale = attention.kwargs.get("scale")
            at = Attended(place, amounts[place], queries, keys, values, scale, node, prefix, suffix, tokens.grid)
            with graph.inserting_before(node.next):
                fewer, state = reduction.insert(at, state)
            tag(fewer, Kind.REDUCED, place)
            node.replace_all_uses_with(fewer, delete_user_cb=before.__contains__)
            number = place + 1


def _site(stream: fx.Node, block: str, nodes: Sequence[fx.Node], attentions: Sequence[fx.Node]) -> ReductionSite:
    """The site of a block, from its nodes and all attentions of the graph."""
    inside = [node for node in nodes if node in attentions]
    if len(inside) != 1:
        plain = (
            "has no attention over the tokens by scaled_dot_product_attention, nor by nn.MultiheadAttention. timm uses it by "
            "timm.layers.set_fused_attn(True), transformers with attn_implementation='sdpa'"
        )
        raise NoSiteError(f"merge: `{block}` {plain if not inside else 'has several attentions, or is called several times'}")
    after = descendants(inside[0])
    others = [node for node in attentions if node in after and node is not inside[0]]
    beyond = descendants(*others) if others else {}
    for node in after:  # the addition may come after the block, in the code that calls it
        if node in beyond:
            break
        pair = operands(node) if shape_of(node) == shape_of(stream) else None
        if pair is None or all(value in after for value in pair):
            continue
        if not _is_passed(node, stream):
            return ReductionSite(block, inside[0].name, node.name)
    raise NoSiteError(
        f"merge: `{block}` has no residual addition after its attention `{inside[0].name}` that all tokens go through: a skip "
        "connection carries tokens past it"
    )


def _is_passed(addition: fx.Node, stream: fx.Node) -> bool:
    """Whether later nodes read tokens that did not go through `addition`."""
    tokens, later = descendants(stream), descendants(addition)
    count = (shape_of(stream) or ())[1]
    return any(
        value not in later and value in tokens and count in (shape_of(value) or ())
        for user in later
        if user is not addition
        for value in user.all_input_nodes
    )


def _average(node: fx.Node, axis: int, sizes: fx.Node, suffix: int) -> None:
    """Weights a mean over tokens by their sizes."""
    given = call_arguments(node)
    options = {key: given[key] for key in ("keepdim", "dtype") if key in given}
    if suffix:
        options["suffix"] = suffix
    node.op, node.target = "call_function", mean_by_size
    node.args, node.kwargs = (given["input"], axis, sizes), options


def _weight(graph: fx.Graph, attention: fx.Node, sizes: fx.Node, ends: tuple[int, ...], number: int) -> None:
    """Weights the keys of an attention by their sizes."""
    with graph.inserting_before(attention):
        arguments = (sizes, attention.args[1], *ends)
        bias = graph.create_node("call_function", size_bias, arguments, name=f"papr_bias_{number}")
    attention.kwargs = {**attention.kwargs, "attn_mask": bias}
