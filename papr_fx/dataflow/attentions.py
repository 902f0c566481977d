"""Finds the nodes of a traced graph that attend to tokens or average them: by running them, whatever their class."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ..errors import NoSiteError
from ..ops.reduction import join_heads, split_heads
from ..tracing.checkpoints import lay_inside, regions_of
from ..tracing.fakes import TRACED_BATCH, fake_like, faking
from ..tracing.graphs import Run, shape_of
from ..tracing.trace import OpenError

# The positional parameters of F.scaled_dot_product_attention, in order.
SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")

_MULTIHEAD_ARGUMENTS = (
    "query",
    "key",
    "value",
    "key_padding_mask",
    "need_weights",
    "attn_mask",
    "average_attn_weights",
    "is_causal",
)
_MEAN_ARGUMENTS = ("input", "dim", "keepdim")
_MULTIHEAD_WEIGHTS = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")


class Attention(NamedTuple):
    """A node that attends to tokens.

    Attributes:
        node: Its name.
        heads: The number of heads if it calls an `nn.MultiheadAttention`, else 0.
    """

    node: str
    heads: int


class Mean(NamedTuple):
    """A node that averages tokens.

    Attributes:
        node: Its name.
        axis: The axis of tokens, 1 of (B, n, C) or 2 of (B, C, n).
    """

    node: str
    axis: int


class TokenReaders(NamedTuple):
    """The nodes whose result depends on how many tokens there are: attentions and means, each in graph order."""

    attentions: tuple[Attention, ...]
    means: tuple[Mean, ...]


def find_readers(
    root: nn.Module, graph: fx.Graph, nodes: Sequence[fx.Node], counts: Collection[int], images: Tensor
) -> TokenReaders:
    """Finds the attentions over tokens, and the means over them, among some nodes of a graph.

    Args:
        root: A copy of the modules that the graph calls.
        graph: A traced graph; it is not changed.
        nodes: The nodes to look at.
        counts: The number of tokens, with and without the prefix tokens.
        images: Images of the traced shape.

    Raises:
        OpenError: An attention or a mean is inside a module that can be traced through.
        NoSiteError: An attention cannot be reached, or it has no meaning for fewer tokens.
    """
    run = _WatchedRun(root, graph, counts)
    mode, fake = fake_like(images, TRACED_BATCH)
    with faking(mode, root):
        run.run(fake)
    seen = {node: run.seen[node] for node in nodes if run.seen[node]}
    closed = {str(node.target) for node in seen if node.op == "call_module" and not _splittable_heads(root, node)}
    for node in seen:
        _check_reachable(root, node)
    if closed:
        reason = f"merge: the attention in `{min(closed)}` cannot be reached, as its code cannot be traced through"
        raise OpenError(closed, reason)
    attentions = [node for node in seen if "attention" in seen[node]]
    for node in attentions:
        _check_plain(node)
    axes = [(node, mean_axis(call_arguments(node), shape_of(node.all_input_nodes[0]) or (), counts)) for node in seen]
    means = tuple(Mean(node.name, axis) for node, axis in axes if axis is not None and "mean" in seen[node])
    return TokenReaders(tuple(Attention(node.name, _splittable_heads(root, node)) for node in attentions), means)


def call_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an attention or a mean, by parameter name."""
    names = {"module": _MULTIHEAD_ARGUMENTS, "attention": SDPA_ARGUMENTS, "mean": _MEAN_ARGUMENTS}
    return _named(names.get(_kind(node), ()), node.args, node.kwargs)


def as_sdpa(graph: fx.Graph, node: fx.Node, heads: int) -> fx.Node:
    """Rewrites an attention as `scaled_dot_product_attention(query, key, value, name=...)`, and returns that call.

    Args:
        graph: The graph to change.
        node: A node of `find_readers`.
        heads: Its `Attention.heads`. If not 0, the call of `nn.MultiheadAttention` becomes its projections and the attention.
    """
    if not heads:
        given = call_arguments(node)
        node.args = tuple(given.pop(name) for name in SDPA_ARGUMENTS[:3])
        node.kwargs = given
        return node
    tokens, name = call_arguments(node)["query"], node.name
    with graph.inserting_before(node):

        def create(function: Callable[..., Any], *arguments: Any, suffix: str) -> fx.Node:
            made = graph.create_node("call_function", function, arguments, name=f"{name}_{suffix}")
            return lay_inside(made, regions_of(node))

        weights = [lay_inside(graph.get_attr(f"{node.target}.{part}"), regions_of(node)) for part in _MULTIHEAD_WEIGHTS]
        split = create(split_heads, create(F.linear, tokens, *weights[:2], suffix="qkv"), heads, suffix="heads")
        queries, keys, values = (create(operator.getitem, split, i, suffix="qkv"[i]) for i in range(3))
        attention = create(F.scaled_dot_product_attention, queries, keys, values, suffix="mixed")
        out = create(F.linear, create(join_heads, attention, suffix="joined"), *weights[2:], suffix="out")
    for user in list(node.users):
        user.replace_all_uses_with(out)
        graph.erase_node(user)
    graph.erase_node(node)
    return attention


def mean_axis(given: dict[str, Any], shape: Sequence[int], counts: Collection[int]) -> int | None:
    """The axis of tokens that a mean with these arguments averages: 1 of (B, n, C), 2 of (B, C, n), else None."""
    axis = given.get("dim", given.get("axis"))
    axis = axis[0] if isinstance(axis, tuple | list) and len(cast("list[Any]", axis)) == 1 else axis
    if len(shape) != 3 or not isinstance(axis, int):
        return None
    return axis % 3 if axis % 3 and shape[axis] in counts else None


def _kind(node: fx.Node) -> str:
    """Which parameters a node takes: those of a module, of an attention, of a mean, or none that are known."""
    if node.op == "call_module":
        return "module"
    if node.target is F.scaled_dot_product_attention:
        return "attention"
    return "mean" if node.target in (torch.mean, "mean") else ""


def _named(names: Sequence[str], args: Sequence[Any], kwargs: Any) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **(kwargs or {})}


def _splittable_heads(root: nn.Module, node: fx.Node) -> int:
    """The heads of a call of `nn.MultiheadAttention` that `as_sdpa` can rewrite; 0 for anything else."""
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(module, nn.MultiheadAttention):
        return 0
    parts = cast(Any, module)  # any of its parameters may be None
    plain = parts.batch_first and parts.in_proj_weight is not None and parts.in_proj_bias is not None
    plain = plain and parts.bias_k is None and not parts.add_zero_attn and not parts.dropout
    return module.num_heads if plain and all(_tuple_index(user) == 0 for user in node.users) else 0


def _tuple_index(user: fx.Node) -> object:
    """The index of the tuple element that a node takes; None if it takes none."""
    return user.args[1] if user.target is operator.getitem else None


def _check_reachable(root: nn.Module, node: fx.Node) -> None:
    """Refuses an attention or a mean inside code that cannot be traced through."""
    if node.op != "call_module":
        if not _kind(node):
            raise NoSiteError(f"merge: the function `{node.name}` attends to tokens, or averages them, inside its own code")
        return
    module = root.get_submodule(str(node.target))
    own = type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential | nn.ModuleList)
    if own and not _splittable_heads(root, node):
        kind = type(module).__name__
        hint = (
            "; supported is one with batch_first and a bias, without dropout, bias_k or add_zero_attn, whose attention weights "
            "are not used"
        )
        raise NoSiteError(
            f"merge: `{node.target}` (torch.nn.{kind}) attends to tokens, or averages them, inside its own code"
            f"{hint if isinstance(module, nn.MultiheadAttention) else ''}"
        )


def _check_plain(node: fx.Node) -> None:
    """Refuses an attention with a mask, a causal one, and one whose queries come from other tokens."""
    given = call_arguments(node)
    if any(given.get(name) is not None for name in ("attn_mask", "key_padding_mask")):
        raise NoSiteError(f"merge: the attention `{node.name}` has a mask or a bias, which is not defined for merged tokens")
    if given.get("is_causal"):
        raise NoSiteError(f"merge: the attention `{node.name}` is causal, so the order of tokens matters")
    if node.op == "call_module" and len({given.get(name) for name in SDPA_ARGUMENTS[:3]}) > 1:
        raise NoSiteError(f"merge: `{node.target}` is not a self-attention: queries, keys and values are different tokens")
    shape = shape_of(given["key"])
    if node.op != "call_module" and (shape is None or len(shape) != 4 or shape[0] != TRACED_BATCH):
        raise NoSiteError(f"merge: the keys of `{node.name}` are {shape}, not (B, heads, N, D)")


class _Watch(TorchFunctionMode):
    """Records whether any call attends to tokens or averages them."""

    def __init__(self, counts: Collection[int]) -> None:
        super().__init__()
        self.counts = counts
        self.seen: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        token_axis = {F.scaled_dot_product_attention: -2, F.multi_head_attention_forward: 0}  # of the keys
        if func in token_axis:
            given = _named(SDPA_ARGUMENTS, args, kwargs)
            if given["key"].shape[token_axis[func]] in self.counts:
                self.seen.add("attention")
        elif func in (torch.mean, Tensor.mean):
            given = _named(_MEAN_ARGUMENTS, args, kwargs)
            if mean_axis(given, given["input"].shape, self.counts) is not None:
                self.seen.add("mean")
        return func(*args, **(kwargs or {}))


class _WatchedRun(Run):
    """Runs a graph, and records what each node does with tokens: `seen[node]` holds "attention", "mean", both or neither."""

    def __init__(self, root: nn.Module, graph: fx.Graph, counts: Collection[int]) -> None:
        super().__init__(root, graph=graph)
        self.counts = counts
        self.seen: dict[fx.Node, set[str]] = {}

    def run_node(self, n: fx.Node) -> Any:
        with _Watch(self.counts) as watch:
            out = super().run_node(n)
        self.seen[n] = watch.seen
        return out
