"""Which modules and values are alike, so that what was found out about one holds for the others.

Blocks of a model differ in the content of their parameters only. A fake run, and a probe that redraws parameters, find the same
for all of them: one is enough.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping
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
# Most values are of these. Whether others are plain takes longer to find out.
_SIMPLE = frozenset({type(None), bool, int, float, str})
_CONTAINERS = frozenset({dict, OrderedDict, list, tuple})
_KNOWN = (nn.Module, fx.Node)
_LARGEST = 1 << 20  # bytes of a tensor whose content is compared
_DEEPEST = 8  # of containers in containers, which may hold themselves


@dataclass(frozen=True, eq=False)
class _Itself:
    """An object that is like no other."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def form_of(
    value: object, known: Mapping[Any, Hashable], of_tensor: Callable[[Tensor], Hashable] | None = None, depth: int = 0
) -> Hashable:
    """Equal for values that a fake run cannot tell apart: of a tensor all but its content, of an unknown object the object.

    Args:
        value: Any value.
        known: Forms of modules and nodes.
        of_tensor: The form of a tensor, if that is another.
        depth: In how many containers `value` lies.
    """
    if type(value) in _SIMPLE:
        return type(value), value  # True is 1
    if isinstance(value, Tensor):
        return (of_tensor or _form)(value)
    if type(value) in _CONTAINERS and not value and not getattr(value, "__dict__", None):
        return (type(value),)
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, _KNOWN) and value in known:
        return type(value), known[value]
    if isinstance(value, set | frozenset):
        return type(value), frozenset(form_of(part, known, of_tensor, depth + 1) for part in cast("set[object]", value))
    parts = _parts(value) if depth < _DEEPEST else None
    return _Itself(value) if parts is None else (type(value), *(form_of(p, known, of_tensor, depth + 1) for p in parts))


def _parts(value: object) -> tuple[object, ...] | None:
    """What a container holds, in order; None for any other object, and for a container with attributes of its own."""
    if isinstance(value, dict | tuple | list) and getattr(value, "__dict__", None):
        return None
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
    """Numbers the modules of `root`, with one number for those that differ in the content of floating parameters only.

    They have the same class, attributes, other tensors and children. A tensor that several modules share is like no other.

    Args:
        root: The modules.
        numbers: Numbers of kinds that were met before, in copies of these modules. New ones are added.
    """
    numbers = {} if numbers is None else numbers
    modules = [module for module in root.modules() if not isinstance(module, torch.jit.ScriptModule)]
    uses = Counter(id(t) for m in modules for t in (*m._parameters.values(), *m._buffers.values()))

    def of_tensor(tensor: Tensor) -> Hashable:
        return _Itself(tensor) if uses[id(tensor)] > 1 else _content(tensor)

    def of_parameter(tensor: Tensor) -> Hashable:
        return _form(tensor) if uses[id(tensor)] == 1 and tensor.is_floating_point() else of_tensor(tensor)

    kinds: dict[nn.Module, int] = {}
    for module in reversed(modules):  # children before their parents
        rest = {name: value for name, value in vars(module).items() if name != "_parameters"}
        known = {**kinds, module: -1}  # its own methods may be among its attributes
        key = (type(module), form_of(module._parameters, known, of_parameter), form_of(rest, known, of_tensor))
        if any(vars(base).get("__slots__") for base in type(module).__mro__):
            key = (_Itself(module),)
        kinds[module] = numbers.setdefault(key, len(numbers))
    return kinds


def _form(tensor: Tensor) -> Hashable:
    if tensor.layout is not torch.strided:
        return _Itself(tensor)
    return type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _content(tensor: Tensor) -> Hashable:
    """A tensor's form and content, which code may read: a table of indices, for one. A large one is like no other."""
    if tensor.is_meta:
        return _form(tensor)
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.nbytes > _LARGEST:
        return _Itself(tensor)
    octets = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return _form(tensor), hashlib.blake2b(octets).digest()
