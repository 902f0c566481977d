"""Records a model as a torch.fx graph: values are known while tracing, and modules stay whole unless opened.

Each proxy carries a fake tensor. Questions about a value (`.dtype`, `.ndim`, whether a size is divisible) are answered
from it, while sizes themselves stay nodes of the graph, so that any batch size runs; where a model's own code reads a size
as a Python number, that is noted, for the caller to refuse it. Only the modules
named in `opened` are traced through; every other one is a single `call_module` node, which keeps dropout, drop-path and
batch norm in the hands of the modules that own them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

import torch
from timm.layers import get_notrace_functions
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import TraceError, first_line
from .fakes import TRACED_BATCH, aliased_copy, fake_like, faking, scratch_copy
from .graphs import annotate, is_in_place, remove_dead_code
from .joins import RecordJoins

# Facts of a tensor that tracing never changes: answered at once, never recorded.
_FIXED_ATTRIBUTES = frozenset(
    {"dtype", "device", "ndim", "layout", "is_cuda", "is_sparse", "is_quantized", "is_nested", "requires_grad", "is_meta"}
)

# These take sizes and no tensor, so a proxy among their arguments would not be noticed by itself.
_FACTORIES = (
    torch.arange,
    torch.zeros,
    torch.ones,
    torch.full,
    torch.empty,
    torch.eye,
    torch.linspace,
    torch.rand,
    torch.randn,
)


@dataclass(frozen=True)
class Traced:
    """A graph, and what tracing found beside it.

    Attributes:
        graph: Nodes carry `shape`, `dtype`, `joins` and `folded` (see `RecordJoins`) in `meta`, and under `inside` the names of
            the modules around them.
        constants: Tensors that the model's code made while it was traced (`_tensor_constant0`, ...).
        recorded: The graph before dead code was removed. Nodes that Python read as a number, a truth value or a length
            carry `read` in `meta`: what they led to is fixed in `graph`.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    recorded: fx.Graph

    def root(self, model: nn.Module, *others: Traced) -> nn.Module:
        """A clone of `model` in which every target of the graph, and of those of `others`, is found."""
        root = aliased_copy(model)
        for name, constant in [pair for traced in (self, *others) for pair in traced.constants.items()]:
            root.register_buffer(name, constant, persistent=False)
        return root

    def beside(self, other: Traced) -> Traced:
        """The same with constants that are not those of `other` under names of their own."""
        names = {
            name: name if name in other.constants and torch.equal(constant, other.constants[name]) else f"training{name}"
            for name, constant in self.constants.items()
        }
        for graph in (self.graph, self.recorded):
            for node in graph.find_nodes(op="get_attr"):
                node.target = names.get(str(node.target), node.target)
        return Traced(self.graph, {names[name]: constant for name, constant in self.constants.items()}, self.recorded)


class ValueProxy(fx.Proxy):
    """A proxy that knows its fake value, kept by the tracer under its node."""

    tracer: ValueTracer

    @property
    def known(self) -> Any:
        return self.tracer.values[self.node]

    def __getattr__(self, k: str) -> Any:
        if k in _FIXED_ATTRIBUTES and isinstance(self.known, Tensor):
            return getattr(self.known, k)
        if getattr(self.known, k, "") is None:
            return None  # code asks `is None`, which no proxy could answer
        return ValueAttribute(self, k)

    def __len__(self) -> int:
        self._read()
        return len(self.known)

    def __iter__(self) -> Iterator[Any]:
        self._read()
        return (self[i] for i in range(len(self.known)))  # pyright: ignore[reportIndexIssue]

    def __contains__(self, item: object) -> bool:
        return item in self.known

    def __index__(self) -> int:
        return int(self._number())

    def __int__(self) -> int:
        return int(self._number())

    def __float__(self) -> float:
        return float(self._number())

    def __format__(self, spec: str) -> str:
        """For messages: one of an assertion that stays in the graph must not claim a value as the one it sees later."""
        return self.node.name if isinstance(self.known, Tensor) else f"{self.node.name} ({self.known} when traced)"

    def _read(self) -> None:
        """Notes that Python goes on with this value: whatever follows from it is fixed from here on."""
        self.node.meta["read"] = True

    def _number(self) -> float:
        self._read()
        if isinstance(self.known, Tensor):
            raise TraceError(f"`{self.node.name}` is read as a Python number: its value depends on the image")
        return self.known


class ValueAttribute(ValueProxy):
    """`proxy.name`: a node only once it is used as a value; called, it is one method node."""

    def __init__(self, owner: ValueProxy, name: str) -> None:
        self.tracer = owner.tracer
        self._owner = owner
        self._name = name
        self._node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self._node is None:
            proxy = self.tracer.create_proxy("call_function", getattr, (self._owner, self._name), {})
            self._node = cast(fx.Proxy, proxy).node
        return self._node

    def __call__(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_method", self._name, (self._owner, *args), kwargs)


def _contexts() -> tuple[bool, bool, bool]:
    """What a `with torch.no_grad()` or `torch.autocast` changes."""
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


class ValueTracer(fx.Tracer):
    """An `fx.Tracer` that evaluates each node on fake tensors as it records it.

    Args:
        opened: Decides from a submodule and its qualified name whether to trace through it.
        sandbox: A second copy of the model on which nodes are evaluated, as forward code may cache what it computes.
        images: The fake images, (B, C, H, W).
        mode: The fake mode that `images` belongs to.
    """

    proxy_buffer_attributes = True  # else what code computes from a buffer would be frozen

    def __init__(
        self, opened: Callable[[nn.Module, str], bool], sandbox: nn.Module, images: Tensor, mode: FakeTensorMode
    ) -> None:
        super().__init__(autowrap_functions=(*get_notrace_functions(), *_FACTORIES))
        self._autowrap_search.append(torch)
        self.values: dict[fx.Node, Any] = {}
        self._opened = opened
        self._sandbox = sandbox
        self._images = images
        self._mode = mode
        self._evaluating = False
        self._contexts = _contexts()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not self._opened(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> ValueProxy:
        return ValueProxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        known = cast(ValueProxy, obj).known
        obj.node.meta["read"] = True
        if isinstance(known, Tensor):
            raise TraceError(f"a branch depends on the content of the image: `if {obj.node.name}` (a tensor)")
        return bool(known)

    def keys(self, obj: fx.Proxy) -> Any:
        return list(cast(ValueProxy, obj).known.keys())

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """One placeholder for the images; every other argument of `forward` keeps its default."""
        name = _image_parameter(root_fn)
        return root_fn, [self.root, self.create_proxy("placeholder", name, (), {})]

    def create_arg(self, a: Any) -> Any:
        """A dataclass that is also a dictionary, such as what transformers' models return, stays of its class."""
        if is_dataclass(a) and isinstance(a, dict):
            given = {field.name: self.create_arg(value) for field in fields(a) if (value := getattr(a, field.name)) is not None}
            return self.create_node("call_function", type(a), (), given)
        return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._evaluating:
            return forward(*args, **kwargs)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except TraceError:
            raise
        except Exception as error:
            name = self.path_of_module(m)
            raise TraceError(f"`{name}` ({type(m).__name__}) cannot be traced: {first_line(error)}", name) from error
        if isinstance(result, ValueProxy) and type(result.known) in (list, tuple):
            return type(result.known)(result)  # code asks `isinstance(x, list)`, which no proxy could answer
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        return attr_val if self._evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        inside = next(reversed(self.module_stack), "")
        if _contexts() != self._contexts:
            raise TraceError(
                f"`{inside or 'forward'}` switches gradients or autocast inside its code, which a graph would lose", inside
            )
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        node = proxy.node
        with ExitStack() as stack:
            stack.callback(setattr, self, "_evaluating", self._evaluating)
            self._evaluating = True
            joins = RecordJoins(self._images.shape[0])
            for context in (faking(self._mode), joins):
                stack.enter_context(context)
            self.values[node] = value = self._evaluate(node)
        annotate(node, value)
        if is_in_place(node) and type(args[0]) is ValueProxy:
            args[0].node = node  # what reads the receiver from here on reads the result
        if joins.joins:
            node.meta["joins"] = joins.joins
        if joins.folded:
            node.meta["folded"] = joins.folded
        return None if value is None else proxy  # code asks `is None`, which no proxy could answer

    def _value_of(self, node: fx.Node) -> Any:
        if node not in self.values:  # a buffer: recorded as an argument, with no proxy of its own
            self.values[node] = self._evaluate(node)
            annotate(node, self.values[node])
        return self.values[node]

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._images
        if node.op == "get_attr":
            value = _attribute(self.root, cast(str, node.target))
            return self._mode.from_tensor(value) if isinstance(value, Tensor) else value
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._value_of)
        if node.op == "call_function":
            return cast(Callable[..., Any], node.target)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], cast(str, node.target))(*args[1:], **kwargs)
        target = cast(str, node.target)
        try:
            return self._sandbox.get_submodule(target)(*args, **kwargs)
        except Exception as error:
            raise TraceError(f"`{target}` refused its input {_shapes(args)}: {first_line(error)}", target) from error


def trace(model: nn.Module, images: Tensor, opened: Callable[[nn.Module, str], bool], *, training: bool = False) -> Traced:
    """Traces `model`, opening the submodules that `opened` picks and whose code can be traced.

    Where the Python code of a picked module cannot be recorded, modules of its class stay whole. Only
    the model's own `forward` must be traceable.

    Args:
        model: Any module whose first argument is an image batch. It is not changed.
        images: A batch (B, C, H, W) of which only shape, dtype and device matter.
        opened: Called with each submodule and its qualified name.
        training: The mode in which the model is traced.

    Returns:
        The graph and what tracing found beside it.

    Raises:
        TraceError: The model's own forward cannot be recorded, or refuses these images.
    """
    closed: set[type[nn.Module]] = set()
    while True:
        picked: set[str] = set()

        def pick(module: nn.Module, name: str, picked: set[str] = picked) -> bool:
            chosen = type(module) not in closed and opened(module, name)
            if chosen:
                picked.add(name)
            return chosen

        root = scratch_copy(model).train(training)
        mode, fake = fake_like(images, TRACED_BATCH)
        before = torch.get_rng_state()
        tracer = ValueTracer(pick, scratch_copy(root), fake, mode)
        try:
            graph = tracer.trace(root)
        except TraceError as error:
            if error.module not in picked:
                raise
            closed.add(type(root.get_submodule(error.module)))
            continue
        except Exception as error:
            raise TraceError(f"{type(model).__name__}.forward cannot be traced: {first_line(error)}") from error
        if not torch.equal(torch.get_rng_state(), before):
            raise TraceError(
                f"{type(model).__name__}.forward draws random numbers of a fixed size{' in training' if training else ''}, "
                "which a graph would fix: draw them like a value of the images (torch.rand_like), or in a module of their own"
            )
        constants = _merged_constants(graph, root, model)
        for node in graph.nodes:
            node.meta.pop("is_wrapped", None)  # GraphModule would wrap `torch.arange` by that name, for every later trace
            node.meta["inside"] = tuple(name for name, _ in node.meta.pop("nn_module_stack", {}).values())
        recorded = copy.deepcopy(graph)
        graph = fx.GraphModule(root, graph).graph  # dead code is told from live by a graph's module
        remove_dead_code(graph)
        graph.lint()
        graph._tracer_cls = None  # else a pickled graph asks for a tracer built without arguments
        return Traced(copy.deepcopy(graph), constants, recorded)  # copies: a graph keeps its module, and is pickled with it


def _merged_constants(graph: fx.Graph, root: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """Tensors that the model's code made while it was traced, equal ones under one name, which nodes then have."""
    constants: dict[str, Tensor] = {}
    for node in graph.find_nodes(op="get_attr"):
        name = cast(str, node.target)
        if "." in name or hasattr(model, name) or name in constants:
            continue
        value = cast(Tensor, _attribute(root, name))
        node.target = next((known for known, other in constants.items() if _same(value, other)), name)
        constants[node.target] = value
    return constants


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and not a.is_meta and torch.equal(a, b)


def _attribute(root: nn.Module, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    return getattr(root.get_submodule(path), leaf)


def _image_parameter(forward: Callable[..., Any]) -> str:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    if not parameters or parameters[0].kind is inspect.Parameter.KEYWORD_ONLY:
        raise TraceError("the model's forward takes no positional argument for the images")
    needed = [p.name for p in parameters[1:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if needed:
        raise TraceError(
            f"the model's forward needs more than the images: {', '.join(needed)}; wrap it in a module that gives them"
        )
    return parameters[0].name


def _shapes(args: tuple[Any, ...]) -> str:
    return ", ".join(str(tuple(a.shape)) if isinstance(a, Tensor) else type(a).__name__ for a in args)
