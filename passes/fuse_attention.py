"""Makes one call of attention that is written out, with all that is added to its scores: biases of positions, masks.

Before:
    scaled  = queries * 0.25
    scores  = scaled @ keys.transpose(-2, -1)                          # (B * windows, heads, N, M)
    biased  = scores + bias
    windows = biased.view(-1, 4, heads, N, M) + mask                   # of shifted windows
    weights = dropout(softmax(windows.view(-1, heads, N, M)))
    mixed   = weights @ values

Becomes:
    papr_mask_0  = attention_mask(queries, (bias,), (mask,))           # (B * windows, heads, N, M)
    papr_fused_0 = scaled_dot_product_attention(queries, keys, values, attn_mask=papr_mask_0, scale=0.25)

Because: both are the same sum, and one call keeps the scores of some queries at a time in the processor's cache. Written out,
they go through memory at every step, and compilers do not change that where something is added. On a CPU, compiled, attention
in the windows of Swin-B takes 0.55 to 0.6 of the time. Results differ by rounding.

Left alone:
    1. Training mode. The fused kernels for a CPU make no gradients of biases; what is called instead takes 1.3 to 1.5 times as
       long as code that is written out.
    2. Dropout that may drop something: a module whose rate is not zero, which may be switched on by itself.
    3. Weights, scores or anything between that something else reads, and modules of them that have hooks.
    4. What is multiplied after something was added, anything else that is done to scores, and sums that are kept per image and
       per window. Keys that are not transposed there, queries, keys and values without exactly two axes of batch and heads, or
       of several dtypes.
    5. Anything changed in place in between, by someone else, or a mask that the scores are added to in place. Functions of a
       user, whatever they return.
    6. What another pass has put something into, such as the last block where only some rows are computed.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from ..dataflow.scores import PRODUCTS, Scores, Term, is_division, is_number, scaled, scores_of, source_of_weights, transposed
from ..ops import attention_mask
from ..tracing.checkpoints import lay_inside, regions_of
from ..tracing.graphs import nodes_by_name, shape_of
from ..tracing.results import is_in_place
from ..tracing.roles import tag
from .kinds import Kind

# What `+=` and the like are in a graph. Methods such as `add_` end in an underscore.
_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.imatmul, operator.setitem)


@dataclass(frozen=True)
class FuseSite:
    """An attention that is written out. Nodes are stored by name, so that it holds for copies of the graph.

    Attributes:
        scores: How its scores follow from queries and keys.
        path: The nodes from the scores to the weights, in order.
        mixed: The product of weights and values.
        keys: The transposed keys.
        factor: Where queries are multiplied with a number, or divided by it, for nothing else.
    """

    scores: Scores
    path: tuple[str, ...]
    mixed: str
    keys: str
    factor: Term | None

    @property
    def nodes(self) -> tuple[str, ...]:
        """All nodes that it replaces, in order. Each but the first two reads the one before it."""
        first = (self.factor.node,) if self.factor else ()
        return (*first, self.scores.product, *self.scores.path, *self.path, self.mixed)


@dataclass(frozen=True)
class Fusing:
    """Where attention becomes one call.

    Attributes:
        sites: The attentions.
        reason: Why there are none although some were found.
    """

    sites: tuple[FuseSite, ...] = ()
    reason: str = ""


def find_sites(graph: fx.Graph, root: nn.Module) -> tuple[FuseSite, ...]:
    """Finds attention that is written out and can be one call.

    Args:
        graph: A traced graph whose nodes carry `shape` and `dtype` in `meta`.
        root: The modules that it calls.
    """
    return tuple(site for node in graph.nodes if node.target in PRODUCTS and (site := _site(node, root)))


def rewrite(graph: fx.Graph, sites: Collection[FuseSite]) -> None:
    """Inserts the calls.

    Args:
        graph: The graph to change, a copy of that of the sites in which other passes may have changed something.
        sites: From `find_sites`.
    """
    nodes = nodes_by_name(graph)
    for number, site in enumerate(sites):
        if _is_whole(site, nodes):
            _fuse(graph, nodes, site, number)


def _site(mixed: fx.Node, root: nn.Module) -> FuseSite | None:
    if mixed.kwargs or len(mixed.args) != 2:
        return None
    weights, values = mixed.args
    if not isinstance(weights, fx.Node) or not isinstance(values, fx.Node):
        return None
    source = source_of_weights(weights, root)
    scores = scores_of(source[0]) if source else None
    if source is None or scores is None:
        return None
    nodes = nodes_by_name(mixed.graph)
    queries, given = nodes[scores.product].args
    keys = transposed(given) if isinstance(given, fx.Node) else None
    if not isinstance(queries, fx.Node) or not isinstance(given, fx.Node) or keys is None or not _fit(queries, keys, values):
        return None
    site = FuseSite(scores, source[1], mixed.name, given.name, scaled(queries))
    same = {regions_of(nodes[name]) for name in site.nodes}
    return site if len(same) == 1 and not _changes_between(nodes, site) else None


def _changes_between(nodes: dict[str, fx.Node], site: FuseSite) -> bool:
    """Whether anything is changed in place while the attention is made: its call would read it later than the model does."""
    node, last = nodes[site.nodes[0]], nodes[site.mixed]
    while node is not last:
        node = node.next
        if node.name not in site.nodes and (is_in_place(node) or node.target in _IN_PLACE):
            return True
    return False


def _fit(queries: fx.Node, keys: fx.Node, values: fx.Node) -> bool:
    """Whether there is a kernel for them: (B, heads, N, D), (B, heads, M, D) and (B, heads, M, D) of one dtype."""
    shapes = [shape_of(node) or () for node in (queries, keys, values)]
    if any(len(shape) != 4 for shape in shapes) or len({node.meta.get("dtype") for node in (queries, keys, values)}) > 1:
        return False
    first, second, third = shapes
    return second == third and first[:2] == second[:2] and first[-1:] == second[-1:]


def _is_whole(site: FuseSite, nodes: dict[str, fx.Node]) -> bool:
    """Whether each of the site's nodes still reads the one before it, and the next one alone reads that."""
    if any(name not in nodes for name in (site.keys, *site.nodes)):
        return False
    own = [nodes[name] for name in site.nodes]
    linked = all(list(before.users) == [after] for before, after in itertools.pairwise(own))
    return linked and nodes[site.scores.product].args[1] is nodes[site.keys]


def _fuse(graph: fx.Graph, nodes: dict[str, fx.Node], site: FuseSite, number: int) -> None:
    """Replaces an attention."""
    mixed = nodes[site.mixed]

    def create(target: Callable[..., Any], *arguments: Any, name: str | None = None, **options: Any) -> Any:
        return lay_inside(graph.create_node("call_function", target, arguments, options, name=name), regions_of(mixed))

    def argument(term: Term) -> Any:
        return nodes[term.node].args[term.place]

    with graph.inserting_before(mixed):
        queries: Any = nodes[site.scores.product].args[0]
        scale: Any = 1.0
        if site.factor:
            queries = nodes[site.factor.node].args[1 - site.factor.place]
        for term in (*([site.factor] if site.factor else []), *site.scores.factors):
            by, applied = argument(term), operator.truediv if is_division(nodes[term.node]) else operator.mul
            if not is_number(by):
                queries = create(applied, queries, by)
            elif scale == 1.0 and applied is operator.mul:
                scale = by
            elif isinstance(by, fx.Node) or isinstance(scale, fx.Node):
                scale = create(applied, scale, by)
            else:
                scale = applied(scale, by)
        mask = None
        if site.scores.terms or site.scores.per_window:
            terms = tuple(argument(term) for term in site.scores.terms)
            windows = tuple(argument(term) for term in site.scores.per_window)
            mask = create(attention_mask, queries, terms, *([windows] if windows else []), name=f"papr_mask_{number}")
        given = queries, nodes[site.keys].args[0], mixed.args[1]
        options = {"attn_mask": mask} if mask else {}
        fused = create(F.scaled_dot_product_attention, *given, name=f"papr_fused_{number}", **options, scale=scale)
    mixed.replace_all_uses_with(tag(fused, Kind.FUSED, number))
    for name in reversed(site.nodes):
        graph.erase_node(nodes[name])
