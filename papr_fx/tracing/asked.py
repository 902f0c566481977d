"""Dtype and device that a model's code asks for: they stay questions in the graph, which so follows `.to()`.

Code such as `x.to(self.weight.dtype)` gets its answer while it is traced, and the graph would hold that answer. So the model is
traced a second time, in another dtype and on another device. Where the two graphs hold different answers, the code had asked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from ..errors import TraceError
from .fakes import scratch_copy
from .graphs import annotate, called, leaves_of
from .trace import Traced

_Answers = Mapping[object, str]  # a dtype or device, and the attribute that was asked for


def with_questions(
    graph: fx.Graph, model: nn.Module, images: Tensor, record: Callable[[nn.Module, Tensor], Traced]
) -> fx.Graph:
    """The graph with each dtype and device that the model's code asked for read from one of its parameters.

    Answers stay where the code takes another path in another dtype. Names of nodes stay.

    Args:
        graph: A traced graph of the model.
        model: The model.
        images: The images that it was traced with.
        record: Traces another model with other images as that graph was traced.
    """
    like = like_images(model, images)
    if like is None:
        return graph
    name, parameter = like
    answers: _Answers = {parameter.dtype: "dtype", parameter.device: "device"}
    if not any(answer in answers for node in graph.nodes for answer in leaves_of((node.args, node.kwargs))):
        return graph
    other = torch.float32 if parameter.dtype == torch.bfloat16 else torch.bfloat16
    for device in (torch.device("meta"), parameter.device):  # code that reads a table's content does not run on meta
        moved = _moved_copy(model, device, other)
        there = images.to(device, other if images.dtype == parameter.dtype else images.dtype)
        try:
            asked = _asked(graph, record(moved, there).graph, answers)
        except TraceError:
            continue
        if asked:
            return _asking(graph, asked, answers, name, parameter)
    return graph


def casts_images(
    graph: fx.Graph, model: nn.Module, images: Tensor, record: Callable[[nn.Module, Tensor], Traced]
) -> tuple[bool, bool]:
    """Whether the model's code first converts floating images to the dtype of `images`, and whether it does so with bytes.

    Code such as `if x.dtype != self.weight.dtype: x = x.to(self.weight.dtype)` leaves no trace where they are equal.

    Args:
        graph: A traced graph of the model.
        model: The model.
        images: The images that it was traced with.
        record: Traces a model with images as that graph was traced.
    """
    other = torch.bfloat16 if images.dtype == torch.float32 else torch.float32
    floating = _casts(graph, lambda: record(model, images.to(other)), images.dtype)
    return floating, floating and _casts(graph, lambda: record(model, images.to(torch.uint8)), images.dtype)


def _casts(graph: fx.Graph, again: Callable[[], Traced], dtype: torch.dtype) -> bool:
    """Whether the model traced again, with other images, does what `graph` does once it has converted them to `dtype`."""
    try:
        other = copy.deepcopy(again().graph)
    except TraceError:  # most models refuse them in their first layer
        return False
    (first,) = other.find_nodes(op="placeholder")
    cast = next(iter(first.users), first)
    if len(first.users) != 1 or called(cast) != "to" or cast.meta.get("dtype") != dtype:
        return False
    cast.replace_all_uses_with(first)
    other.erase_node(cast)
    return _form(graph) == _form(other)


def _form(graph: fx.Graph) -> list[tuple[object, ...]]:
    """What the nodes of a graph do, whatever their names."""
    places = {node: place for place, node in enumerate(graph.nodes)}
    return [
        (node.op, node.target if node.op != "placeholder" else "", *leaves_of(fx.map_arg((node.args, node.kwargs), places.get)))
        for node in graph.nodes
    ]


def like_images(model: nn.Module, images: Tensor) -> tuple[str, Tensor] | None:
    """A parameter with the dtype of the images, by name; of any floating dtype if none has theirs.

    A vector if there is one: quantisation changes matrices.
    """
    floating = [(name, p) for name, p in model.named_parameters() if p.is_floating_point()]
    alike = [(name, p) for name, p in floating if p.dtype == images.dtype] or floating
    return min(alike, key=lambda pair: pair[1].ndim != 1, default=None)


def _moved_copy(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy with its own tensors. `Module.to` would move those of the model, which a scratch copy shares."""
    copied = scratch_copy(model)
    moved: dict[int, Tensor] = {}

    def there(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            moved[id(tensor)] = tensor.detach().to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        return moved[id(tensor)]

    for module in copied.modules():
        module._buffers.update({name: there(t) for name, t in module._buffers.items() if t is not None})
        own = {name: nn.Parameter(there(t), requires_grad=False) for name, t in module._parameters.items() if t is not None}
        module._parameters.update(own)
    return copied


def _asked(graph: fx.Graph, again: fx.Graph, answers: _Answers) -> dict[str, list[bool]] | None:
    """For each node, which of its arguments' leaves differ; None if the graphs differ in more than answers."""
    if len(graph.nodes) != len(again.nodes):
        return None
    found: dict[str, list[bool]] = {}
    for node, other in zip(graph.nodes, again.nodes, strict=True):
        mine, its = (leaves_of((n.args, n.kwargs)) for n in (node, other))
        if node.op != other.op or (node.op != "get_attr" and node.target != other.target) or len(mine) != len(its):
            return None
        found[node.name] = [a in answers and a != b for a, b in zip(mine, its, strict=True)]
    return found if any(any(differ) for differ in found.values()) else None


def _asking(graph: fx.Graph, asked: Mapping[str, list[bool]], answers: _Answers, name: str, like: Tensor) -> fx.Graph:
    """A copy of the graph in which those leaves are read from the parameter of that name."""
    graph = copy.deepcopy(graph)
    first = graph.find_nodes(op="placeholder")[-1].next
    with graph.inserting_before(first):
        parameter = graph.create_node("get_attr", name)
    parameter.meta["inside"] = ()
    annotate(parameter, like)
    questions: dict[str, fx.Node] = {}

    def question(attribute: str) -> fx.Node:
        if attribute not in questions:
            with graph.inserting_before(first):
                questions[attribute] = graph.create_node("call_function", getattr, (parameter, attribute), name=attribute)
            questions[attribute].meta["inside"] = ()
        return questions[attribute]

    for node in list(graph.nodes):
        differ = iter(asked.get(node.name, ()))

        def ask(leaf: Any, differ: Any = differ) -> Any:
            return question(answers[leaf]) if next(differ) else leaf

        if any(asked.get(node.name, ())):
            node.args, node.kwargs = map_aggregate((node.args, node.kwargs), ask)
    return graph
