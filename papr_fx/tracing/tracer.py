"""A tracer whose proxies know their values: fake tensors, computed as each node is recorded.

Questions about a value (`.dtype`, `.ndim`, whether a size is divisible) are answered from the fake tensor. Sizes stay nodes of
the graph, so that any batch size runs. Where a model's code reads a size as a Python number, the node is marked `read`, so
that the caller can refuse it.
"""

from __future__ import annotations

import inspect
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from typing import Any, cast

import torch
from timm.layers import get_notrace_functions
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import TraceError, first_line
from .checkpoints import Checkpoints
from .containers import is_container, rebuilt
from .fakes import faking
from .graphs import annotate, attribute, is_in_place
from .joins import RecordJoins
from .whole_numbers import standing_in

# Facts of a tensor that tracing never changes. They are answered at once and never recorded.
_FIXED_ATTRIBUTES = frozenset(
    {"dtype", "device", "ndim", "layout", "is_cuda", "is_sparse", "is_quantized", "is_nested", "requires_grad", "is_meta"}
)

# These take sizes and no tensor, so torch would not notice a proxy among their arguments.
_FACTORIES = (
    *(torch.arange, torch.zeros, torch.ones, torch.full, torch.empty, torch.eye, torch.linspace),
    *(torch.rand, torch.randn),
)


# Held while a model is traced.
_TRACING = threading.RLock()


class ValueProxy(fx.Proxy):
    """A proxy that knows its fake value. The tracer keeps it under the proxy's node."""

    tracer: ValueTracer

    @property
    def known(self) -> Any:
        """The fake value."""
        return self.tracer.values[self.node]

    def __getattr__(self, k: str) -> Any:
        if k in _FIXED_ATTRIBUTES and isinstance(self.known, Tensor):
            return getattr(self.known, k)
        if getattr(self.known, k, "") is None:
            return None  # code asks `is None`, which no proxy can answer
        return ValueAttribute(self, k)

    def __len__(self) -> int:
        self._read()
        return len(self.known)

    def __iter__(self) -> Iterator[Any]:
        self._read()
        return (self[i] for i in range(len(self.known)))  # pyright: ignore[reportIndexIssue]

    def __contains__(self, item: object) -> bool:
        return bool(self.tracer.create_proxy("call_function", operator.contains, (self, item), {}))  # a value that is read

    def __index__(self) -> int:
        return int(self._number())

    def __int__(self) -> int:
        return int(self._number())

    def __float__(self) -> float:
        return float(self._number())

    def __format__(self, spec: str) -> str:
        """For messages. An assertion may stay in the graph: its message must not show the traced value as the current one."""
        return self.node.name if isinstance(self.known, Tensor) else f"{self.node.name} ({self.known} when traced)"

    def __round__(self, digits: int | None = None) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", round, (self,) if digits is None else (self, digits), {})

    def __abs__(self) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", abs, (self,), {})

    def __divmod__(self, other: Any) -> tuple[fx.Proxy, fx.Proxy]:
        return self // other, self % other

    def _read(self) -> None:
        """Marks that Python code reads this value: whatever it computes from it is a constant of the graph."""
        self.node.meta["read"] = True

    def _number(self) -> float:
        self._read()
        if isinstance(self.known, Tensor):
            raise TraceError(f"`{self.node.name}` is read as a Python number: its value depends on the image")
        return self.known


class ValueAttribute(ValueProxy):
    """`proxy.name`: recorded as a node only once it is used as a value. A call of it is one method node."""

    def __init__(self, owner: ValueProxy, name: str) -> None:
        self.tracer = owner.tracer
        self._owner = owner
        self._name = name
        self._node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The node, recorded at its first use."""
        if self._node is None:
            proxy = self.tracer.create_proxy("call_function", getattr, (self._owner, self._name), {})
            self._node = cast(fx.Proxy, proxy).node
        return self._node

    def __call__(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_method", self._name, (self._owner, *args), kwargs)


class ValueTracer(fx.Tracer):
    """An `fx.Tracer` that evaluates each node on fake tensors as it records it.

    Args:
        opened: Decides from a submodule and its qualified name whether to trace through it.
        scratch: A second copy of the model on which nodes are evaluated: forward code may cache what it computes.
        images: The fake images, (B, C, H, W).
        mode: The fake mode that `images` belongs to.
    """

    proxy_buffer_attributes = True  # otherwise what code computes from a buffer would be a constant

    def __init__(
        self, opened: Callable[[nn.Module, str], bool], scratch: nn.Module, images: Tensor, mode: FakeTensorMode
    ) -> None:
        super().__init__(autowrap_functions=(*get_notrace_functions(), *_FACTORIES))
        self._autowrap_search.append(torch)
        self.values: dict[fx.Node, Any] = {}
        self._opened = opened
        self._scratch = scratch
        self._images = images
        self._mode = mode
        self.evaluating = False
        self._contexts = _contexts()
        self._thread = threading.get_ident()
        self._checkpoints = Checkpoints(lambda: not self._is_plain())

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
        """One placeholder for the images. Every other argument of `forward` keeps its default."""
        name = image_parameter(root_fn)
        return root_fn, [self.root, self.create_proxy("placeholder", name, (), {})]

    def create_arg(self, a: Any) -> Any:
        """Keeps the class of containers: `fx` makes a plain dictionary or list of its subclasses."""
        if is_dataclass(a) and isinstance(a, dict):  # such as the outputs of transformers' models
            given = {field.name: self.create_arg(value) for field in fields(a) if (value := getattr(a, field.name)) is not None}
            return self.create_node("call_function", type(a), (), given)
        if is_container(a):
            made, parts = rebuilt(a)
            return self.create_node("call_function", made, tuple(self.create_arg(part) for part in parts), {})
        return super().create_arg(a)

    def trace(self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Traces in this thread. torch.fx patches `nn.Module` for all of them, so one trace runs at a time."""
        with _TRACING, standing_in(cast(nn.Module, root), self._converted), self._checkpoints.watched():
            self._thread = threading.get_ident()
            return super().trace(root, concrete_args)

    def _converted(self, kind: type, value: Any) -> Any:
        """`kind` of a traced number, recorded; None for any other value, or a tensor: its content is not known."""
        if not isinstance(value, ValueProxy) or isinstance(value.known, Tensor) or self.evaluating:
            return None
        return self.create_proxy("call_function", kind, (value,), {})

    def _is_plain(self) -> bool:
        """Whether modules run as they are: those of other threads, and those that evaluate a node."""
        return self.evaluating or threading.get_ident() != self._thread

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._is_plain():
            return forward(*args, **kwargs)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except TraceError:
            raise
        except Exception as error:
            name = self.path_of_module(m)
            raise TraceError(f"`{name}` ({type(m).__name__}) cannot be traced: {first_line(error)}", name) from error
        if isinstance(result, ValueProxy) and type(result.known) in (list, tuple):
            return type(result.known)(result)  # code asks `isinstance(x, list)`, which no proxy can answer
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        return attr_val if self._is_plain() else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        return self._checkpoints.mark(super().create_node(*args, **kwargs))

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        inside = next(reversed(self.module_stack), "")
        if _contexts() != self._contexts:
            raise TraceError(
                f"`{inside or 'forward'}` switches gradients or autocast inside its code, which a graph would lose", inside
            )
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        node = proxy.node
        with ExitStack() as stack:
            stack.callback(setattr, self, "evaluating", self.evaluating)
            self.evaluating = True
            joins = RecordJoins(self._images.shape[0])
            for context in (faking(self._mode), joins):
                stack.enter_context(context)
            self.values[node] = value = self._evaluate(node)
        annotate(node, value)
        if is_in_place(node) and type(args[0]) is ValueProxy:
            args[0].node = node  # later reads of the changed tensor must come after the change
        if joins.joins:
            node.meta["joins"] = joins.joins
        if joins.folded:
            node.meta["folded"] = joins.folded
        if joins.random:
            node.meta["random"] = True
        return None if value is None else proxy  # code asks `is None`, which no proxy can answer

    def _value_of(self, node: fx.Node) -> Any:
        if node not in self.values:  # a buffer: recorded as an argument, without a proxy of its own
            self.values[node] = self._evaluate(node)
            annotate(node, self.values[node])
        return self.values[node]

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._images
        if node.op == "get_attr":
            value = attribute(self.root, cast(str, node.target))
            return self._mode.from_tensor(value) if isinstance(value, Tensor) else value
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._value_of)
        if node.op == "call_function":
            return cast(Callable[..., Any], node.target)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], cast(str, node.target))(*args[1:], **kwargs)
        target = cast(str, node.target)
        try:
            return self._scratch.get_submodule(target)(*args, **kwargs)
        except Exception as error:
            raise TraceError(f"`{target}` refused its input {_shapes(args)}: {first_line(error)}", target) from error


def image_parameter(forward: Callable[..., Any]) -> str:
    """The name of the parameter of `forward` that takes the images: the first one.

    Raises:
        TraceError: There is none, or others are needed as well.
    """
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    if not parameters or parameters[0].kind is inspect.Parameter.KEYWORD_ONLY:
        raise TraceError("the model's forward takes no positional argument for the images")
    needed = [p.name for p in parameters[1:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if needed:
        raise TraceError(
            f"the model's forward needs more than the images: {', '.join(needed)}; wrap it in a module that gives them"
        )
    return parameters[0].name


def _contexts() -> tuple[bool, bool, bool]:
    """What `with torch.no_grad()` or `torch.autocast` changes."""
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _shapes(args: tuple[Any, ...]) -> str:
    return ", ".join(str(tuple(a.shape)) if isinstance(a, Tensor) else type(a).__name__ for a in args)
