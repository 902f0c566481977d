"""How a rewritten model is called: with the images, and with other arguments of the model's forward as they were traced.

A graph holds one value of each other argument, its default. A caller such as CLIPModel passes these all the same: it says
`interpolate_pos_encoding=False` or `return_dict=True`. So the generated `forward` takes every parameter of the model's own,
and refuses a value that the graph does not stand for. The graph keeps its one placeholder.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen, PythonCode

from ..errors import ArgumentError
from ..tracing.wrappers import unwrapped
from ..versions import format_target
from .checkpointing import is_checkpointed, outline, with_functions

_WAY_OUT = "leave it out, or transform a module whose forward takes the images and passes the other value on"
# Hooks capture these, and no graph runs hooks.
_WAYS_OUT = {
    "output_hidden_states": "leave it out. For the result of one block, cut the blocks behind it off before transform(), as "
    "docs/models.md shows for LLaVA"
}

# Options of transformers' models that a graph follows, and the value that it is traced with.
TRACED_OPTIONS: Mapping[str, bool] = {"output_hidden_states": False, "output_attentions": False, "return_dict": True}


@dataclass(frozen=True)
class Signature:
    """The parameters of a model's forward.

    Attributes:
        model: Class name of the model.
        images: Name of the parameter that takes the images.
        parameters: The others, as Python code: `labels=None`, `**kwargs`.
        accepted: By name, the values that the graph stands for. Not for parameters whose default is no plain value.
        named: Names of the parameters that take one value each.
        rest: Names of `*args` and `**kwargs` among the parameters.
        sides: (H, W), or (T, H, W), of the only images that the graph holds for; empty if it takes several sizes.
        axes: Their axes.
        cast: Name of a parameter: floating images are converted to its dtype. Empty if images are taken as they are.
        integers: Whether integers are converted too. Of bytes a model may make something else.
        grid: The grid of patches of such images, if others with as many patches are taken too; else empty.
    """

    model: str
    images: str
    parameters: tuple[str, ...] = ()
    accepted: Mapping[str, tuple[object, ...]] = field(default_factory=dict[str, "tuple[object, ...]"])
    named: tuple[str, ...] = ()
    rest: tuple[str, ...] = ()
    sides: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()
    cast: str = ""
    integers: bool = False
    grid: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> Signature:
        """The signature of a model's forward. A wrapper that passes on `*args, **kwargs` has that of what it wraps."""
        holder, (first, *others) = _parameters(model)
        config = getattr(holder, "config", None)
        options = {name: (None, value) for name, value in TRACED_OPTIONS.items() if hasattr(config, name)}
        named = [p for p in others if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        accepted = {p.name: options.get(p.name, _values(p)) for p in named}
        return cls(
            type(model).__name__,
            first.name,
            tuple(_codes(others)),
            {**options, **accepted},
            tuple(p.name for p in named),
            tuple(p.name for p in others if p not in named),
        )

    def for_size(self, shape: Sequence[int], layout: str) -> Signature:
        """The same for images of this size only."""
        axes = tuple(layout.index(letter) for letter in "THW" if letter in layout)
        return replace(self, sides=tuple(shape[axis] for axis in axes), axes=axes, grid=())

    def casting(self, parameter: str, *, integers: bool) -> Signature:
        """The same for a model that converts images to the dtype of this parameter: floating ones, or `integers` too."""
        return replace(self, cast=parameter, integers=integers)

    def converted(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Images in that dtype, if they are converted."""
        is_proxy = isinstance(cast(object, images), fx.Proxy)
        return images.to(dtype) if is_proxy or self.integers or images.is_floating_point() else images

    def for_count(self, shape: Sequence[int], layout: str, grid: tuple[int, ...]) -> Signature:
        """The same for images of this size, and of others that have as many patches as `grid`."""
        return replace(self.for_size(shape, layout), grid=grid)

    def on(self, graph: fx.Graph) -> fx.Graph:
        """The same graph, whose code takes these arguments."""
        renamed = self.images != next(iter(graph.nodes)).target
        if self.parameters or self.sides or self.cast or renamed or is_checkpointed(graph):
            graph.set_codegen(CallCode(self))
        return graph

    def check(self, named: Mapping[str, object], *rest: object) -> None:
        """Raises `ArgumentError` for a value that the graph does not stand for.

        Args:
            named: Values of the parameters that take one each.
            *rest: What `*args` and `**kwargs` hold.
        """
        for name, value in named.items():
            self._check(name, value)
        for values in rest:
            if isinstance(values, Mapping):
                for name, value in values.items():
                    self._check(str(name), value)
            elif isinstance(values, tuple) and values:
                raise ArgumentError(f"{self.model} as a graph takes the images, and other arguments by name")

    def check_size(self, images: object) -> None:
        """Raises `ArgumentError` for images of another size than the graph holds for."""
        if not self.sides or not isinstance(images, Tensor):
            return
        if images.ndim != 1 + max(self.axes):
            axes, shape = 1 + max(self.axes), tuple(images.shape)
            raise ArgumentError(f"{self.model} takes a batch, {axes} axes, not a tensor {shape}; one image is x[None]")
        sides = tuple(images.shape[axis] for axis in self.axes)
        if not self._takes(sides):
            others = f" and others of {math.prod(self.grid)} patches" if self.grid else ""
            raise ArgumentError(
                f"{self.model} was transformed for images of {_by(self.sides)}{others}, not {_by(sides)}: call transform with "
                "an example_input of that size, on a model that takes it"
            )

    def _takes(self, sides: tuple[int, ...]) -> bool:
        """Whether the graph holds for images of this size. What is left over beside whole patches may be cut off or padded."""
        if not self.grid:
            return sides == self.sides
        fewest = most = 1
        for side, count, known in zip(sides, self.grid, self.sides, strict=True):  # plain, as `torch.compile` traces this
            fewest *= side * count // known
            most *= (side * count + known - 1) // known
        return fewest <= math.prod(self.grid) <= most

    def _check(self, name: str, value: object) -> None:
        known = self.accepted.get(name, (None,) if name not in self.named else ())
        if value is ... or isinstance(value, fx.Proxy):  # not given; or the generated code is being traced again
            return
        if not any(value is other or (type(value) is type(other) and value == other) for other in known):
            values = " or ".join(map(repr, known)) or "its default"
            raise ArgumentError(
                f"{self.model} is a graph in which `{name}` is {values}, not {_shown(value)}: {_WAYS_OUT.get(name, _WAY_OUT)}"
            )


class CallCode(CodeGen):
    """Generates a `forward` with the parameters of a model, which checks them first, and with its checkpointed regions."""

    def __init__(self, signature: Signature, variables: Mapping[str, object] | None = None) -> None:
        super().__init__()
        self._signature = signature
        self._variables = variables or {}

    def _gen_python_code(self, nodes: Iterable[fx.Node], root_module: str, namespace: Any, **options: Any) -> PythonCode:
        graph = next(iter(nodes)).graph
        if not is_checkpointed(graph):
            return super()._gen_python_code(cast(Any, nodes), root_module, namespace, **options)
        outlined = outline(graph)
        outlined.graph.set_codegen(CallCode(self._signature, outlined.variables))
        code = outlined.graph.python_code(root_module, **options)
        lines = {line: None if i is None else outlined.places[i] for line, i in (code._lineno_map or {}).items()}
        return replace(code, src=with_functions(code.src), _lineno_map=lines)

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, *, expanded_def: bool = False) -> str:
        signature = self._signature
        images = free_vars[-1].split("#")[0].split(":")[0].strip()
        head = super().gen_fn_def([signature.images, *signature.parameters], maybe_return_annotation, expanded_def=expanded_def)
        values = ", ".join(f"{name!r}: {name}" for name in signature.named)
        lines = [f"    {_CHECK}({', '.join(['{' + values + '}', *signature.rest])})"] if signature.parameters else []
        if signature.sides:
            lines.append(f"    {_CHECK_SIZE}({signature.images})")
        if signature.cast:
            dtype = f"{format_target('self', signature.cast)}.dtype"
            lines.append(f"    {signature.images} = {_CONVERT}({signature.images}, {dtype})")
        if images != signature.images:
            lines.append(f"    {images} = {signature.images}")
        return "\n".join([head, *lines])

    def additional_globals(self) -> list[tuple[str, Any]]:
        checks = [
            (_CHECK, self._signature.check),
            (_CHECK_SIZE, self._signature.check_size),
            (_CONVERT, self._signature.converted),
        ]
        return [*checks, *self._variables.items()]


_CONVERT = "papr_converted"
_CHECK = "papr_check_arguments"
_CHECK_SIZE = "papr_check_size"


def _parameters(model: nn.Module) -> tuple[nn.Module, list[inspect.Parameter]]:
    """The parameters of a model's forward, that of the images first, and the module that states them."""
    for inner in unwrapped(model):
        found = list(inspect.signature(type(inner).forward).parameters.values())[1:]
        if found and found[0].kind is not inspect.Parameter.VAR_POSITIONAL:
            return inner, found
    return model, [inspect.Parameter("images", inspect.Parameter.POSITIONAL_OR_KEYWORD)]


def _codes(parameters: list[inspect.Parameter]) -> list[str]:
    """Parameters as Python code."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    codes: list[str] = []
    separated = False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not separated:
            codes.append("*")
        separated |= p.kind in (p.VAR_POSITIONAL, p.KEYWORD_ONLY)
        codes.append(stars[p.kind] + p.name if p.kind in stars else f"{p.name}={_default(p)}")
    return codes


def _default(parameter: inspect.Parameter) -> str:
    """The default as Python code; an ellipsis for what has none."""
    return repr(parameter.default) if _is_plain(parameter.default) else "..."


def _values(parameter: inspect.Parameter) -> tuple[object, ...]:
    """The values that mean the default. A flag that is unset may be given as off."""
    if not _is_plain(parameter.default):
        return ()
    flag = parameter.annotation in (bool | None, "bool | None", "Optional[bool]")
    return (None, False) if flag and not parameter.default else (parameter.default,)


def _is_plain(value: object) -> bool:
    """Whether a value can be written as Python code and compared."""
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


def _shown(value: object) -> str:
    """A value as it is shown in a message."""
    return repr(value) if _is_plain(value) else f"a {type(value).__name__}"


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
