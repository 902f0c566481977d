"""Leaves fewer tokens from one block to the next, between attention and MLP: what merging and its peers have in common.

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

Because: behind the addition every operation up to the next attention treats each token alone, and attention takes any number
of them. A token that stands for s patches weighs s times as much in attentions and averages (Bolya et al., ICLR 2023,
Sec. 3.2): merging equal tokens then changes nothing.

Left alone:
    1. A chosen block with several attentions, or none by `scaled_dot_product_attention` or `nn.MultiheadAttention`.
    2. An attention with a mask or a bias, or a model that uses positions beyond the embedding: a merged token has none.
    3. Tokens from before the attention's residual addition that are read behind it, by a skip connection.
    4. A module of torch.nn that attends to the tokens, or averages them, and cannot be traced through.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor, fx, nn

from ..dataflow.attentions import Attention, Mean, as_sdpa, call_arguments, find_readers
from ..dataflow.moves import operands
from ..errors import ArgumentError, NoSiteError
from ..ops.reduction import mean_by_size, size_bias
from ..tracing.graphs import descendants, shape_of
from . import prune_tokens

Blocks = Literal["second-half", "all"] | Sequence[int]


@dataclass(frozen=True)
class Site:
    """Where a block's tokens become fewer. Nodes are named, so that it holds for copies of its graph.

    Attributes:
        block: Qualified name of the block.
        attention: The node of its attention.
        addition: The residual addition behind it.
    """

    block: str
    attention: str
    addition: str


class Found(NamedTuple):
    """What a reduction changes in a graph.

    Attributes:
        sites: Where tokens become fewer, in order.
        attentions: Nodes that attend to tokens that may be fewer.
        means: Nodes that average them.
    """

    sites: tuple[Site, ...] = ()
    attentions: tuple[Attention, ...] = ()
    means: tuple[Mean, ...] = ()


class State(NamedTuple):
    """What is known of the tokens at a place of the graph.

    Attributes:
        sizes: How many patches each stands for, (B, N); None as long as each stands for itself.
        places: The place that each has in the dense stream, (B, N); None where all are there.
    """

    sizes: fx.Node | None
    places: fx.Node | None


class Attended(NamedTuple):
    """A place where a block's tokens are to become fewer.

    Attributes:
        number: How many there are before it.
        queries: Queries of the block's attention, (B, heads, N, D).
        keys: Its keys, the same.
        values: Its values, the same.
        scale: What it multiplies logits with; None for the root of D.
        tokens: The result of the addition behind it, (B, N, C).
        prefix: Tokens in front of the patches, which stay.
        grid: Sizes of the patches' grid, numbers or nodes.
    """

    number: int
    queries: fx.Node
    keys: fx.Node
    values: fx.Node
    scale: object
    tokens: fx.Node
    prefix: int
    grid: tuple[int | fx.Node, ...]

    def create(self, name: str, function: Callable[..., Any], *arguments: Any) -> fx.Node:
        """A node at the graph's insertion point."""
        return self.tokens.graph.create_node("call_function", function, arguments, name=f"papr_{name}_{self.number}")

    def parts(self, node: fx.Node, *names: str) -> list[fx.Node]:
        """The parts of a tuple, as nodes of those names."""
        return [self.create(name, operator.getitem, node, place) for place, name in enumerate(names)]


@dataclass(frozen=True)
class Reduction(ABC):
    """A way to leave fewer tokens, for `transform(..., merge=...)`.

    Attributes:
        r: Tokens fewer behind each block; at most half of the patches there are.
        blocks: Which blocks: "second-half", "all", or their numbers.
        proportional: Whether attention weighs tokens by the patches that they stand for: yes for models trained with labels,
            no for MAE (PaPr, Sec. 4.1). Averages over tokens are weighted in any case.

    Raises:
        ArgumentError: A value is out of range.
    """

    r: int = 8
    blocks: Blocks = "second-half"
    proportional: bool = True

    def __post_init__(self) -> None:
        r, blocks = cast(Any, self.r), cast(Any, self.blocks)
        if isinstance(r, bool) or not isinstance(r, int) or r < 0:
            raise ArgumentError(f"merge: r (tokens fewer behind each block) must be a whole number from 0 on, not {r!r}")
        words = isinstance(blocks, str) and blocks in ("second-half", "all")
        numbers = isinstance(blocks, Sequence) and not isinstance(blocks, str)
        if not words and not (numbers and all(type(n) is int for n in cast("Sequence[object]", blocks))):
            raise ArgumentError(f'merge: blocks must be "second-half", "all" or numbers of blocks, not {blocks!r}')

    @abstractmethod
    def insert(self, at: Attended, state: State) -> tuple[fx.Node, State]:
        """Inserts nodes at the graph's insertion point; returns the fewer tokens and what is known of them."""


def chosen_blocks(names: Sequence[str], blocks: Blocks) -> list[str]:
    """The blocks that a reduction names, in order.

    Raises:
        ArgumentError: A number is out of range.
    """
    if blocks == "all":
        return list(names)
    if blocks == "second-half":
        return list(names[len(names) // 2 :])
    numbers = cast("Sequence[int]", blocks)
    wrong = [number for number in numbers if not -len(names) <= number < len(names)]
    if wrong:
        raise ArgumentError(f"merge: there is no block {wrong[0]} among {len(names)}, which are 0 to {len(names) - 1}")
    return [names[place] for place in sorted({number % len(names) for number in numbers})]


def find_sites(
    root: nn.Module,
    graph: fx.Graph,
    tokens: prune_tokens.Site,
    blocks: Collection[str],
    wanted: Blocks,
    images: Tensor,
) -> Found:
    """Finds where tokens can become fewer.

    Args:
        root: A copy of the modules that the graph calls.
        graph: A traced graph; it is not changed.
        tokens: Its token stream.
        blocks: Qualified names of the trunk's blocks.
        wanted: In which of them.
        images: Images of the traced shape.

    Raises:
        MustOpenError: Modules are to be traced through first.
        NoSiteError: Fewer tokens would not be sound, with the reason.
    """
    calls: dict[str, list[fx.Node]] = {}
    for name, part in prune_tokens.calls(graph, blocks):  # a block may be called in several parts
        calls.setdefault(name, []).extend(part)
    chosen = chosen_blocks(list(calls), wanted)
    if not chosen:
        return Found()
    nodes = {node.name: node for node in graph.nodes}
    start = list(nodes).index(calls[chosen[0]][0].name)
    counts = {tokens.prefix + prod(tokens.grid), prod(tokens.grid)}
    seen = find_readers(root, graph, [*nodes.values()][start:], counts, images)
    attentions = [nodes[name] for name, _ in seen.attentions]
    return Found(tuple(_site(tokens, block, calls[block], attentions) for block in chosen), *seen)


def rewrite(
    graph: fx.Graph,
    found: Found,
    reduction: Reduction,
    *,
    grid: tuple[int | fx.Node, ...],
    prefix: int,
    keep: fx.Node | None,
) -> None:
    """Leaves fewer tokens at every site.

    Args:
        graph: The graph to change.
        found: From `find_sites` on the dense graph.
        reduction: How.
        grid: Sizes of the patches' grid, numbers or nodes.
        prefix: Tokens in front of the patches, which stay.
        keep: The node of the kept tokens (B, N), where some were dropped.
    """
    additions = {site.addition: site for site in found.sites}
    nodes = list(graph.nodes)
    heads, axes = dict(found.attentions), dict(found.means)
    attended: dict[str, fx.Node] = {}  # each as a call of `scaled_dot_product_attention`
    state, number = State(None, keep), 0
    for node in nodes:
        if node.name in heads:
            attended[node.name] = attention = as_sdpa(graph, node, heads[node.name])
            if state.sizes is not None and reduction.proportional:
                _weigh(graph, attention, state.sizes, number)
        if node.name in axes and state.sizes is not None:
            _average(node, axes[node.name], state.sizes)
        if node.name in additions:
            before = set(graph.nodes)
            attention = attended[additions[node.name].attention]
            queries, keys, values = cast("tuple[fx.Node, ...]", attention.args[:3])
            at = Attended(number, queries, keys, values, attention.kwargs.get("scale"), node, prefix, grid)
            with graph.inserting_before(node.next):
                fewer, state = reduction.insert(at, state)
            node.replace_all_uses_with(fewer, delete_user_cb=before.__contains__)
            number += 1


def _site(tokens: prune_tokens.Site, block: str, nodes: Sequence[fx.Node], attentions: Sequence[fx.Node]) -> Site:
    inside = [node for node in nodes if node in attentions]
    if len(inside) != 1:
        plain = (
            "has no attention over the tokens by scaled_dot_product_attention, nor by nn.MultiheadAttention. timm uses it by "
            "timm.layers.set_fused_attn(True), transformers with attn_implementation='sdpa'"
        )
        raise NoSiteError(f"merge: `{block}` {plain if not inside else 'has several attentions, or is called several times'}")
    shape = tokens.stream.meta["shape"]
    behind = descendants(inside[0])
    stream = descendants(tokens.stream)
    others = [node for node in attentions if node in behind and node is not inside[0]]
    beyond = descendants(*others) if others else {}
    for node in behind:  # the addition may stand behind the block, in the code that calls it
        if node in beyond:
            break
        pair = operands(node) if node in behind and shape_of(node) == shape else None
        if pair is None or all(value in behind for value in pair):
            continue
        later = descendants(node)
        crossing = [
            value
            for user in later
            if user is not node
            for value in user.all_input_nodes
            if value not in later and value in stream and shape[1] in (shape_of(value) or ())
        ]
        if not crossing:
            return Site(block, inside[0].name, node.name)
    raise NoSiteError(
        f"merge: `{block}` has no residual addition behind its attention `{inside[0].name}` after which nothing reads the "
        "tokens from before it"
    )


def _average(node: fx.Node, axis: int, sizes: fx.Node) -> None:
    """Gives a mean the sizes of its tokens."""
    given = call_arguments(node)
    options = {key: given[key] for key in ("keepdim", "dtype") if key in given}
    node.op, node.target = "call_function", mean_by_size
    node.args, node.kwargs = (given["input"], axis, sizes), options


def _weigh(graph: fx.Graph, attention: fx.Node, sizes: fx.Node, number: int) -> None:
    """Gives an attention the sizes of its keys."""
    with graph.inserting_before(attention):
        bias = graph.create_node("call_function", size_bias, (sizes, attention.args[1]), name=f"papr_bias_{number}")
    attention.kwargs = {**attention.kwargs, "attn_mask": bias}
