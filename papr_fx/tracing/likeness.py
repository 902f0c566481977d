"""Which modules and values are alike, so that what was found out about one holds for the others.

Blocks of a model differ in the content of their parameters only. A fake run, and a probe that redraws parameters, find the same
for all of them: one is enough.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, type, Enum, FunctionType, BuiltinFunctionType),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout),
)
_PARTS = frozenset({"_parameters", "_buffers", "_modules"})
_DEEPEST = 8  # of containers in containers, which may hold themselves


@dataclass(frozen=True, eq=False)
class _Itself:
    """An object that is like no other."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def form_of(value: object, known: Mapping[Any, Hashable], depth: int = 0) -> Hashable:
    """Equal for values that a fake run cannot tell apart: of a tensor all but its content, of an unknown object the object.

    Args:
        value: Any value.
        known: Forms of modules and nodes.
        depth: In how many containers `value` lies.
    """
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            return _Itself(value)
        return type(value), value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    if isinstance(value, _PLAIN):
        return type(value), value  # True is 1
    if isinstance(value, nn.Module | fx.Node) and value in known:
        return type(value), known[value]
    if isinstance(value, set | frozenset):
        return type(value), frozenset(form_of(part, known, depth + 1) for part in cast("set[object]", value))
    parts = _parts(value) if depth < _DEEPEST else None
    return _Itself(value) if parts is None else (type(value), *(form_of(part, known, depth + 1) for part in parts))


def _parts(value: object) -> tuple[object, ...] | None:
    """What a container holds, in order; None for any other object."""
    if isinstance(value, dict):
        return tuple(part for pair in cast("dict[object, object]", value).items() for part in pair)
    if isinstance(value, tuple | list):
        return tuple(cast("list[object]", value))
    if isinstance(value, slice):
        return value.start, value.stop, value.step
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if isinstance(value, MethodType):
        return value.__func__, value.__self__
    return None


def kinds_of_modules(root: nn.Module, numbers: dict[Hashable, int] | None = None) -> dict[nn.Module, int]:
    """Numbers the modules of `root`, with one number for those that differ in the content of their parameters only.

    They have the same class, attributes, buffers and children. A tensor that several modules share is like no other.

    Args:
        root: The modules.
        numbers: Numbers of kinds that were met before, in copies of these modules. New ones are added.
    """
    numbers = {} if numbers is None else numbers
    modules = [module for module in root.modules() if not isinstance(module, torch.jit.ScriptModule)]
    uses = Counter(id(t) for m in modules for t in (*m._parameters.values(), *m._buffers.values()))
    kinds: dict[nn.Module, int] = {}
    for module in reversed(modules):  # children before their parents
        tensors = [
            (name, _Itself(tensor) if uses[id(tensor)] > 1 and tensor is not None else of(tensor))
            for of, held in ((_form, module._parameters), (_content, module._buffers))
            for name, tensor in held.items()
        ]
        rest = {name: value for name, value in vars(module).items() if name not in _PARTS}
        known = {**kinds, module: -1}  # its own methods may be among its attributes
        key = (type(module), tuple(tensors), form_of(module._modules, known), form_of(rest, known))
        kinds[module] = numbers.setdefault(key, len(numbers))
    return kinds


def _form(tensor: Tensor | None) -> Hashable:
    return form_of(tensor, {})


def _content(buffer: Tensor | None) -> Hashable:
    """A buffer's form and content, which code may read: a table of indices, for one."""
    if buffer is None or buffer.is_meta:
        return _form(buffer)
    if type(buffer) not in (Tensor, nn.Buffer) or buffer.layout is not torch.strided:
        return _Itself(buffer)
    octets = buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return _form(buffer), hashlib.blake2b(octets).digest()
