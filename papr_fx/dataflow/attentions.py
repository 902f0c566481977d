"""Where a traced graph attends to tokens, or averages them: found by what runs, in modules of any class."""

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
from ..tracing.fakes import TRACED_BATCH, fake_like, faking
from ..tracing.graphs import shape_of

# Parameters of nn.MultiheadAttention.
_PROJECTIONS = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")


# Parameters of `scaled_dot_product_attention` that may be given by position.
ATTENTION_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")

_PARAMETERS = {
    "attention": ATTENTION_PARAMETERS,
    "module": ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal"),
    "mean": ("input", "dim", "keepdim"),
}


class Attention(NamedTuple):
    """A node that attends to tokens.

    Attributes:
        node: Its name.
        heads: Of an `nn.MultiheadAttention`, how many heads it has; else 0.
    """

    node: str
    heads: int


class Mean(NamedTuple):
    """A node that averages tokens, and over which axis of (B, n, C) or (B, C, n)."""

    node: str
    axis: int


class Seen(NamedTuple):
    """Nodes that attend to tokens, and those that average them, in order."""

    attentions: tuple[Attention, ...]
    means: tuple[Mean, ...]


class WholeError(Exception):
    """Modules hold an attention or an average that is to be reached: they are to be traced through first.

    Attributes:
        modules: Their qualified names.
    """

    def __init__(self, modules: set[str]) -> None:
        super().__init__()
        self.modules = modules


def find_attention(root: nn.Module, graph: fx.Graph, nodes: Sequence[fx.Node], counts: Collection[int], images: Tensor) -> Seen:
    """Finds what attends to tokens among some nodes of a graph, or averages them.

    Args:
        root: A copy of the modules that the graph calls.
        graph: A traced graph; it is not changed.
        nodes: Some of its nodes.
        counts: How many tokens there are, with and without those of the prefix.
        images: Images of the traced shape.

    Raises:
        WholeError: Modules are to be traced through first.
        NoSiteError: An attention is of a kind that says nothing of fewer tokens.
    """
    watched = _Watched(root, graph, counts)
    mode, fake = fake_like(images, TRACED_BATCH)
    with faking(mode):
        watched.run(fake)
    seen = {node: watched.seen[node] for node in nodes if watched.seen[node]}
    whole = {str(node.target) for node in seen if node.op == "call_module" and not _heads(root, node)}
    for node in seen:
        _check_reachable(root, node)
    if whole:
        raise WholeError(whole)
    attentions = [node for node in seen if "attention" in seen[node]]
    for node in attentions:
        _check_bare(node)
    axes = [(node, mean_axis(arguments(node), shape_of(node.all_input_nodes[0]) or (), counts)) for node in seen]
    means = tuple(Mean(node.name, axis) for node, axis in axes if axis is not None and "mean" in seen[node])
    return Seen(tuple(Attention(node.name, _heads(root, node)) for node in attentions), means)


def arguments(node: fx.Node) -> dict[str, Any]:
    """What an attention or a mean is given, by the names of its parameters."""
    return _named(_PARAMETERS.get(_kind(node), ()), node.args, node.kwargs)


def spelled_out(graph: fx.Graph, node: fx.Node, heads: int) -> fx.Node:
    """An attention as a call of `scaled_dot_product_attention` on queries, keys and values, and other things by name.

    Puts it, and projections, in the place of an `nn.MultiheadAttention` of so many heads.
    """
    if not heads:
        given = arguments(node)
        node.args = tuple(given.pop(name) for name in _PARAMETERS["attention"][:3])
        node.kwargs = given
        return node
    tokens, name = arguments(node)["query"], node.name
    with graph.inserting_before(node):

        def create(function: Callable[..., Any], *arguments: Any, suffix: str) -> fx.Node:
            return graph.create_node("call_function", function, arguments, name=f"{name}_{suffix}")

        weights = [graph.get_attr(f"{node.target}.{part}") for part in _PROJECTIONS]
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
    """The axis of tokens, 1 or 2 of (B, n, C) or (B, C, n), that a mean with these arguments is over; else None."""
    axis = given.get("dim", given.get("axis"))
    axis = axis[0] if isinstance(axis, tuple | list) and len(cast("list[Any]", axis)) == 1 else axis
    if len(shape) != 3 or not isinstance(axis, int):
        return None
    return axis % 3 if axis % 3 and shape[axis] in counts else None


def _kind(node: fx.Node) -> str:
    """What a node does that is itself a call of it."""
    if node.op == "call_module":
        return "module"
    if node.target is F.scaled_dot_product_attention:
        return "attention"
    return "mean" if node.target in (torch.mean, "mean") else ""


def _named(names: Sequence[str], args: Sequence[Any], kwargs: Any) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **(kwargs or {})}


def _heads(root: nn.Module, node: fx.Node) -> int:
    """The heads of a call of `nn.MultiheadAttention` that can be spelled out; 0 for anything else."""
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(module, nn.MultiheadAttention):
        return 0
    parts = cast(Any, module)  # any of its parameters may be None
    plain = parts.batch_first and parts.in_proj_weight is not None and parts.in_proj_bias is not None
    plain = plain and parts.bias_k is None and not parts.add_zero_attn and not parts.dropout
    return module.num_heads if plain and all(_part(user) == 0 for user in node.users) else 0


def _part(user: fx.Node) -> object:
    """Which part of a tuple a node takes."""
    return user.args[1] if user.target is operator.getitem else None


def _check_reachable(root: nn.Module, node: fx.Node) -> None:
    """Refuses what attends or averages inside code that cannot be traced through."""
    if node.op != "call_module":
        if not _kind(node):
            raise NoSiteError(f"merge: the function `{node.name}` attends to tokens, or averages them, inside its own code")
        return
    module = root.get_submodule(str(node.target))
    own = type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential | nn.ModuleList)
    if own and not _heads(root, node):
        kind = type(module).__name__
        hint = "; one with dropout, biases of keys, without batch_first or a bias, or whose weights are used, is not followed"
        raise NoSiteError(
            f"merge: `{node.target}` (torch.nn.{kind}) attends to tokens, or averages them, inside its own code"
            f"{hint if isinstance(module, nn.MultiheadAttention) else ''}"
        )


def _check_bare(node: fx.Node) -> None:
    """Refuses an attention with a mask, of other queries, or one that is causal."""
    given = arguments(node)
    if any(given.get(name) is not None for name in ("attn_mask", "key_padding_mask")):
        raise NoSiteError(f"merge: the attention `{node.name}` is given a mask or a bias, which says nothing of merged tokens")
    if given.get("is_causal"):
        raise NoSiteError(f"merge: the attention `{node.name}` is causal, so that the order of tokens matters")
    if node.op == "call_module" and len({given.get(name) for name in ("query", "key", "value")}) > 1:
        raise NoSiteError(f"merge: `{node.target}` is no self-attention: queries, keys and values are not the same tokens")
    shape = shape_of(given["key"])
    if node.op != "call_module" and (shape is None or len(shape) != 4 or shape[0] != TRACED_BATCH):
        raise NoSiteError(f"merge: the keys of `{node.name}` are {shape}, not (B, heads, N, D)")


class _Watch(TorchFunctionMode):
    """Notes which calls attend to tokens, or average them."""

    def __init__(self, counts: Collection[int]) -> None:
        super().__init__()
        self.counts = counts
        self.seen: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keys = {F.scaled_dot_product_attention: -2, F.multi_head_attention_forward: 0}  # the axis that counts them
        if func in keys:
            given = _named(_PARAMETERS["attention"], args, kwargs)
            if given["key"].shape[keys[func]] in self.counts:
                self.seen.add("attention")
        elif func in (torch.mean, Tensor.mean):
            given = _named(_PARAMETERS["mean"], args, kwargs)
            if mean_axis(given, given["input"].shape, self.counts) is not None:
                self.seen.add("mean")
        return func(*args, **(kwargs or {}))


class _Watched(fx.Interpreter):
    """Runs a graph and notes in which of its nodes tokens are attended to, or averaged."""

    def __init__(self, root: nn.Module, graph: fx.Graph, counts: Collection[int]) -> None:
        super().__init__(root, graph=graph)
        self.counts = counts
        self.seen: dict[fx.Node, set[str]] = {}

    def run_node(self, n: fx.Node) -> Any:
        with _Watch(self.counts) as watch:
            out = super().run_node(n)
        self.seen[n] = watch.seen
        return out
