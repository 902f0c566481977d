"""A tracer whose proxies know their values: fake tensors, computed as each node is recorded.

Nothing that other threads see is changed: they serve, compile and trace models meanwhile.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial, wraps
from types import FunctionType
from typing import Any, cast

import torch
from timm.layers import get_notrace_functions
from torch import Tensor, fx, nn

from ..errors import TraceError, first_line
from ..versions import is_wrapped, symbolic_tracing
from .captures import is_capture
from .checkpoints import Checkpoints
from .containers import is_container, rebuilt
from .fakes import faking
from .graphs import annotate, attribute, leaves_of
from .joins import RecordJoins
from .opened_modules import opened_modules
from .own_names import OwnNames
from .proxies import ValueProxy, place
from .results import LikeResults, Result, is_in_place
from .whole_numbers import stand_in

# These take sizes and no tensor, so torch would not notice a proxy among their arguments.
_FACTORIES = (
    *(torch.arange, torch.zeros, torch.ones, torch.full, torch.empty, torch.eye, torch.linspace),
    *(torch.rand, torch.randn),
)


# Types that PyTorch takes for a dtype; `fx` takes none as an argument.
_DTYPES: dict[type, torch.dtype] = {int: torch.int64, float: torch.float64, bool: torch.bool}


class ValueTracer(fx.Tracer):
    """An `fx.Tracer` that evaluates each node on fake tensors as it records it.

    Args:
        opened: Decides from a submodule and its qualified name whether to trace through it.
        scratch: A second copy of the model on which nodes are evaluated: forward code may cache what it computes.
        images: The fake images, (B, C, H, W).
        results: Evaluates nodes, those of equal blocks once.
    """

    proxy_buffer_attributes = True  # otherwise what code computes from a buffer would be a constant

    def __init__(
        self, opened: Callable[[nn.Module, str], bool], scratch: nn.Module, images: Tensor, results: LikeResults
    ) -> None:
        super().__init__(autowrap_functions=(*get_notrace_functions(), *_FACTORIES))
        self.values: dict[fx.Node, Any] = {}
        self._results = results
        self._opened = opened
        self._scratch = scratch
        self._images = images
        self._mode = results.mode
        self.evaluating = False
        self._contexts = _contexts()
        self._checkpoints = Checkpoints(lambda: not self.evaluating)
        self._kinds: dict[type, type] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not self._opened(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> ValueProxy:
        return ValueProxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        known = cast(ValueProxy, obj).known
        obj.node.meta["read"] = place()
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
        return super().create_arg(_DTYPES.get(self._real(a), a) if isinstance(a, type) else a)

    def _real(self, a: Any) -> Any:
        """What a stand-in for `int` or `float` stands for, which code may pass as a dtype; `a` itself otherwise."""
        return self._kinds.get(a, a) if isinstance(a, type) else a

    def trace(self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """As `fx.Tracer.trace` does, but patches `root` only, where that patches `nn.Module` and global names."""
        self.root = model = cast(nn.Module, root)
        self.root_module_name = type(model).__name__
        self.submodule_paths = {module: name for name, module in model.named_modules()}
        self.graph = fx.Graph()
        self.tensor_attrs = {}  # of plain tensors, which are buffers here
        proxies: dict[str, fx.Proxy] = {}
        kinds = {kind.__name__: stand_in(kind, partial(self._converted, kind)) for kind in (int, float)}
        self._kinds = {kinds[kind.__name__]: kind for kind in (int, float)}
        own = OwnNames(self._named, {**kinds, "len": self._length})
        modules = opened_modules(model, self._called, lambda name, t: self.getattr(name, t, proxies), own)
        with symbolic_tracing(), self._checkpoints.watched(), modules:
            forward, args = self.create_args_for_root(
                own.function(cast(FunctionType, type(model).forward)), True, concrete_args
            )
            self.create_node("output", "output", (self.create_arg(forward(*args)),), {})
        self.submodule_paths = None
        return self.graph

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """While another thread exports, PyTorch would write what that one does at the moment into `meta`."""
        node = super().create_node(*args, **kwargs)
        node.meta.clear()
        node.meta["inside"] = tuple(name for name, _ in self.module_stack.values())
        return self._checkpoints.mark(node)

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.call_module(module, module._call_impl, args, kwargs)

    def _named(self, names: dict[str, Any], name: str, value: Any) -> Any:
        """A function that takes no tensor, or that must not be traced through: recorded where an argument is traced."""
        if id(value) in self._autowrap_function_ids or is_wrapped(names, name):
            return self._recorded(value)
        return value

    def _recorded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(leaf, fx.Proxy) for leaf in leaves_of((args, kwargs))):
                return self.create_proxy("call_function", function, args, kwargs)
            return function(*map(self._real, args), **{name: self._real(value) for name, value in kwargs.items()})

        return call

    def _converted(self, kind: type, value: Any) -> Any:
        """`kind` of a traced number, recorded; None for any other value, or a tensor: its content is not known."""
        if not isinstance(value, ValueProxy) or isinstance(value.known, Tensor) or self.evaluating:
            return None
        return self.create_proxy("call_function", kind, (value,), {})

    def _length(self, value: Any) -> Any:
        """`len` of a tensor that follows the images is its first size, recorded: Python would ask for a number."""
        if self.evaluating or not isinstance(value, ValueProxy) or not isinstance(value.known, Tensor):
            return len(value)
        return value.size(0) if value.known.ndim and value.node.op != "get_attr" else len(value.known)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.evaluating:
            return forward(*args, **kwargs)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except TraceError:
            raise
        except Exception as error:
            name = self.path_of_module(m)
            raise TraceError(f"`{name}` ({type(m).__name__}) cannot be traced: {first_line(error)}", name) from error
        if isinstance(result, ValueProxy) and type(result.known) in (list, tuple):
            result = type(result.known)(result)  # code asks `isinstance(x, list)`, which no proxy can answer
        if self.is_leaf_module(m, self.path_of_module(m)):  # the code of others runs them itself
            for hook in [hook for hook in m._forward_hooks.values() if is_capture(hook)]:
                hook(m, args, result)
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        return attr_val if self.evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        inside = next(reversed(self.module_stack), "")
        if _contexts() != self._contexts:
            raise TraceError(
                f"`{inside or 'forward'}` switches gradients or autocast inside its code, which a graph would lose", inside
            )
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        node = proxy.node
        for argument in node.all_input_nodes:
            self._value_of(argument)
        result = self._results.of(node, self.values, lambda: self._result(node))
        self.values[node] = result.value
        annotate(node, result.value)
        node.meta.update(result.meta)
        if is_in_place(node) and type(args[0]) is ValueProxy:
            args[0].node = node  # later reads of the changed tensor must come after the change
        return None if result.value is None else proxy  # code asks `is None`, which no proxy can answer

    def _result(self, node: fx.Node) -> Result:
        """The fake value of a node, and what `RecordJoins` notes meanwhile."""
        joins = RecordJoins(self._images.shape[0])
        before, self.evaluating = self.evaluating, True
        try:
            with faking(self._mode), joins:
                value = self._evaluate(node)
        finally:
            self.evaluating = before
        noted = {"joins": joins.joins, "folded": joins.folded, "random": joins.random}
        return Result(value, {name: found for name, found in noted.items() if found})

    def _value_of(self, node: fx.Node) -> Any:
        if node not in self.values:  # a buffer: recorded as an argument, without a proxy of its own
            self.values[node] = self._evaluate(node)
            self._results.note(node, self.values[node])
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
