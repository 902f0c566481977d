"""Where a traced graph attends to tokens, or averages them: found by what runs, in modules of any class."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from .errors import NoSiteError
from .reduction import join_heads, split_heads
from .trace import TRACED_BATCH, fake_like, faking

# Parameters of nn.MultiheadAttention.
_PROJECTIONS = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")


class Attention(NamedTuple):
    """A node that attends to tokens.

    Attributes:
        node: Its name.
        heads: Of an `nn.MultiheadAttention`, how many heads it has; else 0.
    """

    node: str
    heads: int


class Seen(NamedTuple):
    """Nodes that attend to tokens, and the names of those that average them, in order."""

    attentions: tuple[Attention, ...]
    means: tuple[str, ...]


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
    whole = [node for node in seen if node.op == "call_module" and not _heads(root, node)]
    stuck = [node for node in whole if type(root.get_submodule(str(node.target))).__module__.startswith("torch.nn.")]
    if stuck:
        kind = type(root.get_submodule(str(stuck[0].target))).__name__
        raise NoSiteError(
            f"merge: `{stuck[0].target}` (torch.nn.{kind}) attends to tokens or averages them inside its own code"
        )
    if whole:
        raise WholeError({str(node.target) for node in whole})
    attentions = [node for node in seen if "attention" in seen[node]]
    for node in attentions:
        _check_bare(node)
    means = tuple(node.name for node in seen if "mean" in seen[node])
    return Seen(tuple(Attention(node.name, _heads(root, node)) for node in attentions), means)


def spelled_out(graph: fx.Graph, node: fx.Node, heads: int) -> fx.Node:
    """Puts `scaled_dot_product_attention` and projections in the place of an nn.MultiheadAttention; returns the former."""
    tokens, name = node.args[0], node.name
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


def _heads(root: nn.Module, node: fx.Node) -> int:
    """The heads of a call of `nn.MultiheadAttention` that can be spelled out; 0 for anything else."""
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(module, nn.MultiheadAttention) or node.op != "call_module":
        return 0
    parts = cast(Any, module)  # any of its parameters may be None
    plain = parts.batch_first and parts.in_proj_weight is not None and parts.in_proj_bias is not None
    plain = plain and parts.bias_k is None and not parts.add_zero_attn and not parts.dropout
    return module.num_heads if plain and all(_part(user) == 0 for user in node.users) else 0


def _part(user: fx.Node) -> object:
    """Which part of a tuple a node takes."""
    return user.args[1] if user.target is operator.getitem else None


def _check_bare(node: fx.Node) -> None:
    """Refuses an attention with a mask, of other queries, or one that is causal."""
    given = [node.kwargs.get("attn_mask"), node.kwargs.get("key_padding_mask"), *node.args[3:4]]
    if any(mask is not None for mask in given):
        raise NoSiteError(f"merge: the attention `{node.name}` is given a mask or a bias, which says nothing of merged tokens")
    if node.kwargs.get("is_causal"):
        raise NoSiteError(f"merge: the attention `{node.name}` is causal, so that the order of tokens matters")
    if node.op == "call_module" and (len(node.args) < 3 or len(set(node.args[:3])) > 1):
        raise NoSiteError(f"merge: `{node.target}` is no self-attention: queries, keys and values are not the same tokens")


class _Watch(TorchFunctionMode):
    """Notes which calls attend to tokens, or average them."""

    def __init__(self, counts: Collection[int]) -> None:
        super().__init__()
        self.counts = counts
        self.seen: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        keys = {F.scaled_dot_product_attention: -2, F.multi_head_attention_forward: 0}  # the axis that counts them
        if func in keys and args[1].shape[keys[func]] in self.counts:
            self.seen.add("attention")
        elif func in (torch.mean, Tensor.mean) and args[0].ndim == 3 and args[0].shape[1] in self.counts:
            axes = (kwargs or {}).get("dim", args[1] if len(args) > 1 else None)
            if axes in (1, -2, (1,), (-2,), [1], [-2]):
                self.seen.add("mean")
        return out


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
