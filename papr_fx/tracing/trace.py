"""Records a model as a torch.fx graph. Only opened modules are traced through.

Every other module is one `call_module` node, so that dropout, drop-path and batch norm stay with the modules that own them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn

from ..errors import TraceError, first_line
from .captures import forget_captures
from .fakes import TRACED_BATCH, aliased_copy, fake_images, fake_parameters, hooked, scratch_copy
from .flattened import name_holders
from .graphs import attribute, remove_dead_code
from .joins import WatchDraws
from .numerics import forked_random
from .results import LikeResults, ReshapedError
from .sources import GraphModule
from .tracer import ValueTracer

_HOOKS = "Forward hooks (of {}) do not run while a model is traced: it must not need them"


class OpenError(Exception):
    """Modules must be traced through before a question about the graph can be answered.

    Attributes:
        modules: Their qualified names.
        whole_class: Whether to trace through the other modules of their classes as well.
        reason: What to say if they cannot be traced through.
    """

    def __init__(self, modules: set[str], reason: str, *, whole_class: bool = False) -> None:
        super().__init__(reason)
        self.modules = modules
        self.whole_class = whole_class
        self.reason = reason


@dataclass(frozen=True)
class Traced:
    """A graph, and what else tracing found.

    Attributes:
        graph: Nodes carry `shape`, `dtype`, `joins` and `folded` (see `RecordJoins`) in `meta`, and under `inside` the names of
            the modules around them.
        constants: Tensors that the model's code created while it was traced (`_tensor_constant0`, ...).
        recorded: The graph before dead code was removed. Nodes that Python code read as a number, a truth value or a length
            carry `read` in `meta`: what was computed from them is constant in `graph`.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    recorded: fx.Graph

    def root(self, model: nn.Module, *others: Traced) -> nn.Module:
        """A copy of `model` that has every target of the graph, and of the graphs of `others`."""
        root = forget_captures(aliased_copy(model))  # the graph needs them no more
        for name, constant in [pair for traced in (self, *others) for pair in traced.constants.items()]:
            root.register_buffer(name, constant, persistent=False)
        return root

    def scratch_root(self, model: nn.Module) -> nn.Module:
        """A scratch copy of `model` that has every target of the graph."""
        root = scratch_copy(model)
        for name, constant in self.constants.items():
            root.register_buffer(name, constant.clone(), persistent=False)
        return root

    def module(self, model: nn.Module) -> fx.GraphModule:
        """The graph over a scratch copy of `model`, in eval mode."""
        return GraphModule(self.scratch_root(model).eval(), copy.deepcopy(self.graph))

    def beside(self, other: Traced) -> Traced:
        """The same with new names for those constants that differ from the constants of `other`."""
        names = {
            name: name if name in other.constants and torch.equal(constant, other.constants[name]) else f"training{name}"
            for name, constant in self.constants.items()
        }
        for graph in (self.graph, self.recorded):
            for node in graph.find_nodes(op="get_attr"):
                node.target = names.get(str(node.target), node.target)
        return Traced(self.graph, {names[name]: constant for name, constant in self.constants.items()}, self.recorded)


def trace(model: nn.Module, images: Tensor, opened: Callable[[nn.Module, str], bool], *, training: bool = False) -> Traced:
    """Traces `model` through the submodules that `opened` picks.

    Where the Python code of a picked module cannot be recorded, all modules of its class stay whole. Only the model's own
    `forward` must be traceable.

    Args:
        model: Any module whose first argument is an image batch. It is not changed.
        images: A batch (B, C, H, W). Only its shape, dtype and device matter.
        opened: Called with each submodule and its qualified name.
        training: The mode in which the model is traced.

    Returns:
        The graph and what else tracing found.

    Raises:
        TraceError: The model's own forward cannot be recorded, or refuses these images.
    """
    closed: set[type[nn.Module]] = set()
    hooks, shares = hooked(model), True
    while True:
        picked: set[str] = set()

        def pick(module: nn.Module, name: str, picked: set[str] = picked) -> bool:
            chosen = type(module) not in closed and opened(module, name)
            if chosen:
                picked.add(name)
            return chosen

        root = scratch_copy(model).train(training)
        _register_tensors(root)
        try:
            tracing = _Tracing(pick, images, shares=shares, hooks=bool(hooks))
            return _cleaned(_recorded(root, tracing), root, model)
        except ReshapedError:
            shares = False
        except TraceError as error:
            if error.module not in picked:
                if hooks:
                    raise TraceError(f"{error}. {_HOOKS.format(', '.join(hooks))}", error.module) from error
                raise
            closed.add(type(root.get_submodule(error.module)))


def _register_tensors(root: nn.Module) -> None:
    """Makes plain tensors of the modules buffers: only those are values of the graph, which sizes of the images can shape."""
    for module in root.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                delattr(module, name)
                module.register_buffer(name, value.detach(), persistent=False)


@dataclass(frozen=True)
class _Tracing:
    """How a model is traced.

    Attributes:
        pick: Decides from a submodule and its qualified name whether to trace through it.
        images: A batch such as the model takes.
        shares: Whether nodes may share results, see `LikeResults`.
        hooks: Whether the model has hooks of the user.
    """

    pick: Callable[[nn.Module, str], bool]
    images: Tensor
    shares: bool
    hooks: bool


def _recorded(root: nn.Module, tracing: _Tracing) -> fx.Graph:
    """The graph as it was recorded, with dead code."""
    name, images = type(root).__name__, tracing.images
    scratch = scratch_copy(root)
    results = LikeResults(scratch, "joins", shares=tracing.shares)
    mode, fake = results.mode, fake_images(results.mode, images, TRACED_BATCH)
    tracer = ValueTracer(tracing.pick, scratch, fake, results)
    draws = WatchDraws(lambda: not tracer.evaluating)
    try:
        with draws, fake_parameters(scratch, mode):
            graph = tracer.trace(root)
    except TraceError:
        raise
    except Exception as error:
        reason = "" if tracing.hooks else _refusal(root, images)  # a scratch copy does not run the user's hooks
        raise TraceError(reason or f"{name}.forward cannot be traced: {first_line(error)}") from error
    name_holders(graph, root)
    if draws.drew:
        raise TraceError(
            f"{name}.forward draws random numbers of a fixed size{' in training' if root.training else ''}, which would be "
            "constants of the graph: draw them like a value of the images (torch.rand_like), or in a module of their own"
        )
    return graph


@torch.no_grad()
def _refusal(root: nn.Module, images: Tensor) -> str:
    """What the model itself says against images of this size; empty if it takes them."""
    try:
        with forked_random(images):
            scratch_copy(root)(images.new_zeros((TRACED_BATCH, *images.shape[1:])))
    except torch.OutOfMemoryError:  # says nothing about the model
        return ""
    except Exception as error:  # it is user code, and may raise anything
        size = f"{type(root).__name__} itself does not run on images {tuple(images.shape)}"
        return f"{size}: {first_line(error)}. Pass an example_input that it takes"
    return ""


def _cleaned(graph: fx.Graph, root: nn.Module, model: nn.Module) -> Traced:
    """The graph without dead code, and its constants."""
    constants = _merged_constants(graph, root, model)
    recorded = copy.deepcopy(graph)
    graph = GraphModule(root, graph).graph  # whether code is dead is asked of the graph's module
    remove_dead_code(graph)
    graph.lint()
    graph._tracer_cls = None  # a pickled graph would ask for a tracer built without arguments
    return Traced(copy.deepcopy(graph), constants, recorded)  # copied, as a graph keeps its module, and is pickled with it


def _merged_constants(graph: fx.Graph, root: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """Tensors that the model's code created while it was traced. Equal ones get one name, also in the graph."""
    constants: dict[str, Tensor] = {}
    for node in graph.find_nodes(op="get_attr"):
        name = cast(str, node.target)
        if "." in name or hasattr(model, name) or name in constants:
            continue
        value = cast(Tensor, attribute(root, name))
        node.target = next((known for known, other in constants.items() if _same(value, other)), name)
        constants[node.target] = value
    return constants


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and not a.is_meta and torch.equal(a, b)
