"""Which arguments a node may get a few rows of: found by running it on random numbers, never by name.

A value holds a row for each token along one axis. A node f whose result holds them too may get the first rows only of some
arguments, if that gives the same rows of the result:

    f(rows(x), rows(y)) = rows(f(x, y))        Linear, norm, activation, addition
    f(rows(q), k, v) = rows(f(q, k, v))        attention: each query is answered independently

and a node that reads a few rows, such as a head that takes the class token, if it gives the same result: f(rows(x)) = f(x).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from ..tracing.fakes import MODEL_ERRORS, scratch_copy
from ..tracing.graphs import called, is_in_place, leaves_of, shape_of
from ..tracing.numerics import exact_float32, forked_random, holds_indices, redraw, relative_error, tensors_of, unit_scale
from .arguments import Argument, Rows, UnknownError, count_place, filled, sizes_of, view_sizes
from .attentions import SDPA_ARGUMENTS

_TOLERANCE = 1e-4
_MOST_TRIALS = 32
_DROPOUTS = (F.dropout, torch.dropout)
_IN_PLACE = ("iadd", "isub", "imul", "itruediv")


class Trial(NamedTuple):
    """What a node may get.

    Attributes:
        arguments: The arguments that it may get rows of; empty if there are none.
        reason: Why not.
    """

    arguments: tuple[Argument, ...] = ()
    reason: str = ""


class RowProbe:
    """Runs the nodes of a traced graph on random numbers of the traced shapes, on the CPU, with parameters at unit scale.

    Args:
        root: The modules that the graph calls.
        rows: Which rows.
    """

    def __init__(self, root: nn.Module, rows: Rows) -> None:
        self._root = root
        self._rows = rows
        self._random = torch.Generator("cpu").manual_seed(0)

    def trial(self, node: fx.Node, axis: int | None) -> Trial:
        """The arguments of `node` that rows are enough of.

        Args:
            node: A node of a traced graph.
            axis: The axis of its value of which only these rows are read, counted from the end; None if all is read.
        """
        if axis is not None and (is_in_place(node) or called(node) in _IN_PLACE):  # twice may be as once: numbers do not tell
            return Trial(reason="changes its argument in place")
        options = list(self._options(node, axis))
        if not options:
            return Trial(reason="reads no value with a row for each token")
        try:
            with forked_random(torch.empty(0, device="cpu")), exact_float32(), torch.device("cpu"):
                return self._first(node, axis, options)
        except UnknownError as error:
            return Trial(reason=f"was not tried ({error})")

    def _first(self, node: fx.Node, axis: int | None, options: Sequence[tuple[Argument, ...]]) -> Trial:
        """The first of the options that gives the same rows."""
        values, call = self._values(node), self._callable(node)
        used = {cast(int, user.args[1]) for user in node.users} if "parts" in node.meta else set[int]()
        with torch.no_grad():
            whole = self._read(self._run(call, node, values), axis, used)
            for arguments in options:
                try:
                    found = self._run(call, node, self._cut(values, arguments), axis)
                except UnknownError:
                    continue
                if relative_error(_used(found, used), whole) <= _TOLERANCE:
                    break
            else:
                return Trial(reason="mixes rows, or tells them apart by their number")
        if node.op == "call_module" and self._reads_more_in_training(node, values, arguments, axis):
            return Trial(reason="mixes rows in training mode" if axis is not None else "reads other rows in training mode")
        return Trial(arguments)

    def _options(self, node: fx.Node, axis: int | None) -> Iterator[tuple[Argument, ...]]:
        """Choices of arguments and of their axes, first those that cut most arguments."""
        axes: dict[int, list[int]] = {}
        for place, leaf in enumerate(leaves_of((node.args, node.kwargs))):
            if not isinstance(leaf, fx.Node):
                continue
            if "parts" in leaf.meta and axis is not None and called(node) == "getitem":
                axes[place] = [axis]
                continue
            shape = shape_of(leaf) or ()
            found = [a for a in range(-len(shape), 0) if shape[a] == self._rows.of]
            if found:
                axes[place] = sorted(found, key=lambda a: a != axis)
        choices = [
            tuple(Argument(place, a) for place, a in zip(axes, chosen, strict=True) if a is not None)
            for chosen in product(*([*found, None] for found in axes.values()))
        ]
        yield from sorted(filter(None, choices), key=len, reverse=True)[:_MOST_TRIALS]

    def _cut(self, values: Sequence[Any], arguments: Sequence[Argument]) -> list[Any]:
        cut = list(values)
        for place, axis in arguments:
            cut[place] = self._rows_of(cut[place], axis)
        return cut

    def _rows_of(self, value: Any, axis: int) -> Any:
        """The first rows of a tensor, or of the tensors of a tuple that have them."""
        if isinstance(value, Tensor):
            has_rows = value.ndim >= -axis and value.shape[axis] == self._rows.of
            return value.narrow(axis, 0, self._rows.count).clone() if has_rows else value  # no kernel reads on behind it
        return type(value)(self._rows_of(part, axis) for part in value) if isinstance(value, tuple | list) else value

    def _read(self, value: Any, axis: int | None, used: set[int]) -> Any:
        """What is read of a result."""
        return _used(value if axis is None else self._rows_of(value, axis), used)

    def _values(self, node: fx.Node) -> list[Any]:
        """Random numbers for the arguments of a node. A value that is read twice is the same."""
        known: dict[fx.Node, Any] = {}

        def value(leaf: object) -> Any:
            if not isinstance(leaf, fx.Node):
                return leaf
            if leaf not in known:
                known[leaf] = self._drawn(leaf)
            return known[leaf]

        return [value(leaf) for leaf in leaves_of((node.args, node.kwargs))]

    def _drawn(self, node: fx.Node) -> Any:
        parts = node.meta.get("parts")
        if parts:
            return tuple(self._random_of(shape) if shape is not None else None for shape in parts)
        shape = shape_of(node)
        if shape is None:
            return sizes_of(node, {})
        if not node.meta["dtype"].is_floating_point:
            raise UnknownError(f"`{node.name}` holds no floating-point numbers")
        return unit_scale(shape, self._random, torch.float32) if node.op == "get_attr" else self._random_of(shape)

    def _random_of(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self._random, device="cpu", dtype=torch.float32)

    def _callable(self, node: fx.Node) -> Callable[..., Any]:
        """What a node calls. Modules run in eval mode."""
        if node.op == "call_method":
            return partial(_call_method, str(node.target))
        if node.op == "call_function":
            return cast(Callable[..., Any], node.target)
        return self._module(node, training=False)

    def _module(self, node: fx.Node, *, training: bool) -> Callable[..., Any]:
        module = scratch_copy(self._root.get_submodule(str(node.target))).train(training)
        if any(buffer.is_meta and holds_indices(buffer) for buffer in module.buffers()):
            raise UnknownError("it holds indices without values, on the meta device")
        if isinstance(module, torch.jit.ScriptModule):
            return module
        return partial(_call_module, module, redraw(module, self._random, torch.float32))

    def _run(self, call: Callable[..., Any], node: fx.Node, values: Sequence[Any], axis: int | None = None) -> Any:
        """Calls a node on these values; if it makes a shape, one with these rows on that axis."""
        args, kwargs = filled(node, values)
        place = count_place(node, axis, self._rows.of)
        if place is not None:
            sizes = [size if isinstance(size, int) else sizes_of(size, {}) for size in view_sizes(node)]
            sizes[place] = self._rows.count
            args, call = (args[0], tuple(sizes)), torch.reshape
        try:
            with _Checked():
                return call(*args, **kwargs)
        except MODEL_ERRORS as error:
            raise UnknownError(type(error).__name__) from error

    def _reads_more_in_training(
        self, node: fx.Node, values: Sequence[Any], arguments: Sequence[Argument], axis: int | None
    ) -> bool:
        """Whether what is read of a module's result depends on other rows in training mode, as with a batch norm."""
        inputs = [values[place].clone().requires_grad_() for place, _ in arguments]
        given = list(values)
        for (place, _), value in zip(arguments, inputs, strict=True):
            given[place] = value
        with torch.enable_grad():
            result = self._run(self._module(node, training=True), node, given)
            found = tensors_of(result if axis is None else self._rows_of(result, axis))
            total = cast(Tensor, sum((t * self._random_of(t.shape)).sum() for t in found))
            try:
                found_gradients: Any = torch.autograd.grad(total, inputs, allow_unused=True)  # None where one is unused
            except MODEL_ERRORS as error:
                raise UnknownError(type(error).__name__) from error
        others = self._rows.of - self._rows.count
        pairs = zip(arguments, found_gradients, strict=True)
        return any(g is not None and bool(g.narrow(a, self._rows.count, others).any()) for (_, a), g in pairs)


def _call_module(module: nn.Module, values: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    return functional_call(module, values, args, kwargs)


def _call_method(name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(value, name)(*args, **kwargs)


def _used(value: Any, used: set[int]) -> Any:
    """The parts of a tuple that are read; any other value as it is."""
    return [value[part] for part in sorted(used)] if used else value


class _Checked(TorchFunctionMode):
    """While active, functions drop nothing, as rows of random results cannot be compared, and attentions check lengths."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            given: dict[str, Any] = {**dict(zip(SDPA_ARGUMENTS, args, strict=False)), **kwargs, "dropout_p": 0.0}
            if given["key"].shape[-2] != given["value"].shape[-2]:  # fused kernels on a CPU do not look
                raise ValueError("there are not as many keys as values")
            return func(**given)
        return func(*args, **kwargs)
