"""What a rewritten module takes over from its model besides graph, modules and tensors: attributes, properties, flags."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping
from types import MethodType
from typing import Any, cast

from torch import Tensor, fx, nn

from ..tracing.fakes import flags_of

# Methods that only name parameters: timm's optimisers ask for them. Other methods of the model would run it unpruned.
_NAMING = frozenset({"no_weight_decay", "group_matcher"})


def plain_attributes(model: nn.Module) -> dict[str, Any]:
    """The attributes of a model that are neither its tensors nor its modules, and hold none: `config`, `num_classes`."""
    internal = vars(nn.Module()).keys() | {"forward"}
    return {name: value for name, value in vars(model).items() if name not in internal and _is_plain(value)}


def _is_plain(value: object) -> bool:
    """False for what must not be kept, or cannot be copied: modules, graphs and computed tensors, also in containers."""
    if isinstance(value, Tensor):
        return value.is_leaf
    if isinstance(value, MethodType):
        return _is_plain(value.__self__)
    if isinstance(value, Mapping):
        return all(map(_is_plain, cast("Mapping[Any, Any]", value).values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, cast("list[Any]", value)))
    return not isinstance(value, nn.Module | fx.Graph)


def add_class_attributes(to: type[nn.Module], model: type[nn.Module]) -> None:
    """Gives the class of one rewritten module the properties and constants of the model's class that it does not define.

    Properties are evaluated on the rewritten module, so `device` and `dtype` follow it.
    """
    for name in dir(model):
        value = inspect.getattr_static(model, name)
        described = isinstance(value, property | functools.cached_property) or name in _NAMING
        if not name.startswith("__") and not hasattr(to, name) and (described or not hasattr(type(value), "__get__")):
            setattr(to, name, value)


def flags_by_mode(model: nn.Module) -> dict[bool, dict[str, bool]]:
    """The flags that the model's own `train(mode)` gives to its modules; empty where the class does not define one.

    Args:
        model: A copy: its flags are changed and set back, by name.
    """
    if type(model).train is nn.Module.train:
        return {}
    before, found = model.training, dict[bool, dict[str, bool]]()
    for mode in (not before, before):
        model.train(mode)
        found[mode] = flags_of(model)
    return found


def importable(kind: type[nn.Module]) -> type[nn.Module]:
    """The class, or the first of its bases that a pickle can name, as it cannot name a class of a function."""
    return next(base for base in kind.__mro__ if _is_importable(base))


def _is_importable(kind: type) -> bool:
    try:
        found: Any = importlib.import_module(kind.__module__)
        for part in kind.__qualname__.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return False
    return found is kind
