"""Attention that is written out: how its weights follow from the product of queries and keys."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.layers import get_notrace_functions
from torch import fx, nn

from ..ops import is_watched
from ..tracing.fakes import MODEL_ERRORS
from ..tracing.graphs import attribute, nodes_by_name, shape_of

PRODUCTS = (operator.matmul, torch.matmul, "matmul")
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_ADDS_IN_PLACE = (operator.iadd, "add_")
_SCALINGS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_DIVISIONS = (operator.truediv, operator.itruediv, torch.div, "div", "div_")
_IN_PLACE = (operator.imul, operator.itruediv, "mul_", "div_")
_VIEWS = (torch.reshape, torch.flatten, "view", "reshape", "flatten", "unflatten")
_CASTS = ("to", "type_as", "float", "half", "bfloat16")
_SOFTMAXES = (torch.softmax, F.softmax, "softmax")


class Term(NamedTuple):
    """A value that is added to scores, or that they are multiplied with. Nodes are stored by name.

    Attributes:
        node: The node that does it.
        place: The place of the value among its arguments.
    """

    node: str
    place: int


@dataclass(frozen=True)
class Scores:
    """How the scores of an attention follow from queries and keys. Nodes are stored by name.

    Attributes:
        product: The product of queries and keys.
        path: The nodes from there to the scores, in order; each reads the one before it.
        terms: What is added.
        per_window: What is added to scores in which the windows of an image have an axis of their own.
        factors: What the product is multiplied with, or divided by.
    """

    product: str
    path: tuple[str, ...] = ()
    terms: tuple[Term, ...] = ()
    per_window: tuple[Term, ...] = ()
    factors: tuple[Term, ...] = ()


def source_of_weights(weights: fx.Node, root: nn.Module) -> tuple[fx.Node, tuple[str, ...]] | None:
    """The scores whose softmax over keys some weights are, and the nodes from its input to the weights, in order.

    Dropout that drops nothing may follow, and a conversion. None if the weights are something else, or if anything else reads
    what lies between.
    """
    path: list[str] = []
    node = weights
    while len(node.users) == 1 and node.all_input_nodes:
        path.insert(0, node.name)
        given = node.args[0] if node.args else None
        if not isinstance(given, fx.Node):
            return None
        if _is_softmax(node, root):
            return given, tuple(path)
        if not _drops_nothing(node, root) and not _is_cast(node):
            return None
        node = given
    return None


def scores_of(node: fx.Node) -> Scores | None:
    """How scores (B, heads, N, M) follow from queries and keys; None if they do in no way that is known here.

    Anything else that reads a value between makes it unknown. What is multiplied must come before what is added.
    """
    shape = shape_of(node) or ()
    return _scores(node, tuple(shape)) if len(shape) == 4 else None


def scaled(node: fx.Node) -> Term | None:
    """Where a node is another value times a number, or divided by one, the place of the number; None if it is not."""
    if node.kwargs or len(node.args) != 2 or len(node.users) != 1 or node.target in _IN_PLACE:
        return None
    for place in (1, 0) if node.target in _SCALINGS else (1,) if node.target in _DIVISIONS else ():
        if is_number(node.args[place]) and isinstance(node.args[1 - place], fx.Node):
            return Term(node.name, place)
    return None


def _returns_first(node: fx.Node) -> bool:
    """Whether a function of timm gives its first argument back as it is, such as one that adds a mask if there is one.

    Functions of others may do something besides, or something else in another dtype.
    """
    if node.target not in get_notrace_functions() or node.all_input_nodes != [*node.args[:1]]:
        return False
    given = torch.empty(shape_of(node.all_input_nodes[0]) or (), device="meta")
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: given)
    try:
        found = cast(Callable[..., Any], node.target)(*args, **kwargs)
    except MODEL_ERRORS:
        return False
    return found is given and given._version == 0  # in place, it would be another


def is_number(value: object) -> bool:
    """Whether an argument of a node is a number, or a node whose value is one."""
    if isinstance(value, fx.Node):
        value = value.meta.get("value")
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_division(node: fx.Node) -> bool:
    """Whether a node divides."""
    return node.target in _DIVISIONS


def transposed(node: fx.Node) -> fx.Node | None:
    """The value of which a node is the transpose in its last two axes; None if it is something else."""
    given = node.args[0] if node.args else None
    rank = len(shape_of(node) or ())
    if not isinstance(given, fx.Node) or rank < 2 or node.kwargs:
        return None
    if node.target is getattr:
        return given if node.args[1] == "mT" else None
    axes: Any = list(node.args[1:])
    axes = list(axes[0]) if len(axes) == 1 and isinstance(axes[0], tuple | list) else axes
    if any(not isinstance(axis, int) for axis in axes):
        return None
    axes = [axis % rank for axis in axes]
    if node.target in (torch.transpose, torch.swapaxes, torch.swapdims, "transpose", "swapaxes", "swapdims"):
        return given if sorted(axes) == [rank - 2, rank - 1] else None
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    return given if node.target in (torch.permute, "permute") and axes == swapped else None


def _scores(node: fx.Node, scores: tuple[int, ...]) -> Scores | None:
    """The same for a value on the way, which nothing but the next node may read. `scores` is the shape of the result."""
    shape = shape_of(node)
    if len(node.users) != 1 or shape is None or not _is_form(shape, scores):
        return None
    if node.target in PRODUCTS:
        return Scores(node.name) if shape == scores and not node.kwargs else None
    if node.target in _VIEWS or _returns_first(node):
        return _before(node, 0, scores)
    if node.kwargs or len(node.args) != 2:
        return None
    if node.target in _ADDITIONS:
        # In place, it is the first argument that changes, which others may read if it is no product of this attention.
        other = None if node.target in _ADDS_IN_PLACE else _added(node, 0, shape, scores)
        return _added(node, 1, shape, scores) or other
    if node.target in _SCALINGS:
        return _multiplied(node, 1, scores) or _multiplied(node, 0, scores)
    return _multiplied(node, 1, scores) if node.target in _DIVISIONS else None


def _before(node: fx.Node, place: int, scores: tuple[int, ...]) -> Scores | None:
    """The scores that a node reads at a place. The node is on their path."""
    given = node.args[place]
    found = _scores(given, scores) if isinstance(given, fx.Node) else None
    return found and replace(found, path=(*found.path, node.name))


def _added(node: fx.Node, place: int, shape: tuple[int, ...], scores: tuple[int, ...]) -> Scores | None:
    """The scores to which a node adds its argument at a place."""
    term = node.args[place]
    own = shape_of(term) if isinstance(term, fx.Node) else None
    if not isinstance(term, fx.Node) or own is None or len(own) > len(shape):
        return None
    if term.meta.get("dtype") != node.meta.get("dtype"):
        return None
    windows = len(shape) == 5
    if windows and ((len(own) == 5 and own[0] != 1) or len(own) < 4 or own[-4] != shape[1]):
        return None
    found = _before(node, 1 - place, scores)
    if found is None:
        return None
    added = (Term(node.name, place),)
    kinds = (found.terms, found.per_window + added) if windows else (found.terms + added, found.per_window)
    found = replace(found, terms=kinds[0], per_window=kinds[1])
    return found if _is_small(found, node.graph) else None


def _is_small(found: Scores, graph: fx.Graph) -> bool:
    """Whether, if something is added per window, all else that is added is the same for each image."""
    if not found.per_window:
        return True
    nodes = nodes_by_name(graph)
    shapes = [shape_of(cast(fx.Node, nodes[term.node].args[term.place])) or () for term in found.terms]
    return all(len(shape) < 4 or shape[0] == 1 for shape in shapes)


def _multiplied(node: fx.Node, place: int, scores: tuple[int, ...]) -> Scores | None:
    """The scores that a node multiplies with its argument at a place, or divides by it."""
    by = node.args[place]
    if not is_number(by):
        shape = shape_of(by) if isinstance(by, fx.Node) else None
        if is_division(node) or not shape or shape[-1] != 1 or len(shape) > 4 or shape_of(node) != scores:
            return None
        if isinstance(by, fx.Node) and by.meta.get("dtype") != node.meta.get("dtype"):
            return None
    found = _before(node, 1 - place, scores)
    if found is None or found.terms or found.per_window:
        return None
    return replace(found, factors=(*found.factors, Term(node.name, place)))


def _is_form(shape: Sequence[int], scores: Sequence[int]) -> bool:
    """Whether values of a shape are scores, or scores in which the windows of an image have an axis of their own."""
    if tuple(shape) == tuple(scores):
        return True
    return len(shape) == 5 and tuple(shape[2:]) == tuple(scores[1:]) and shape[0] * shape[1] == scores[0]


def _is_cast(node: fx.Node) -> bool:
    """Whether a node converts weights to another floating dtype."""
    dtype = node.meta.get("dtype")
    return node.target in _CASTS and dtype is not None and dtype.is_floating_point


def _is_softmax(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node is the softmax over the last axis of its only argument."""
    rank = len(shape_of(node) or ())
    if node.op == "call_module":
        module = attribute(root, str(node.target))
        return type(module) is nn.Softmax and not is_watched(module) and module.dim in (-1, rank - 1)
    given = dict(zip(("input", "dim"), node.args, strict=False)) | node.kwargs
    known = {"input", "dim", "dtype", "_stacklevel"}
    return node.target in _SOFTMAXES and given.get("dim") in (-1, rank - 1) and given.keys() <= known


def _drops_nothing(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node is a dropout that never drops, or nothing at all. A module's rate may act whenever it is not zero."""
    if node.op == "call_module":
        module = attribute(root, str(node.target))
        if is_watched(module):
            return False
        return type(module) is nn.Identity or (type(module) is nn.Dropout and module.p == 0)
    if node.target is not F.dropout:
        return False
    given = dict(zip(("input", "p", "training"), node.args, strict=False)) | node.kwargs
    return any(name in given and given[name] in off for name, off in (("p", (0,)), ("training", (False,))))
