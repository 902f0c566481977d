"""Copies of a model to experiment on, and fake images to run them with."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, first_line
from ..versions import FakeTensorMode
from .caches import remove_fakes
from .captures import forget_captures, is_capture
from .results import fake_mode, fake_of
from .sharded import plain_modules, stand_in_for_shards
from .surroundings import without_log

# Samples of the fake images while tracing. Not 1: broadcasting would hide which sizes follow the batch.
TRACED_BATCH = 2

_IMMUTABLE = frozenset({bool, int, float, str, type(None)})
_CONTAINERS = frozenset({dict, OrderedDict, list, set})

# What the code of a model raises for inputs that it does not take.
MODEL_ERRORS = (RuntimeError, ValueError, AssertionError, TypeError, LookupError, AttributeError)


def aliased_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every parameter and buffer, and has the same flags and hooks.

    Raises:
        ArgumentError: The model holds something that cannot be copied.
    """
    return _copied(model, [*model.parameters(), *model.buffers()])


def scratch_copy(model: nn.Module) -> nn.Module:
    """A copy to run on fake tensors: it shares parameters only, and calls no hooks but those that compute its parameters.

    In-place operations on a small buffer, such as a batch count, run even on fake tensors, so buffers are copied. Parameters
    of which this process holds a part only are stood in for: each has the shape of the whole one.
    """
    copied = forget_captures(_copied(model, list(model.parameters())))
    stand_in_for_shards(copied)
    for module in copied.modules():
        module._forward_hooks.clear()
        for number, hook in list(module._forward_pre_hooks.items()):
            if not _computes_parameters(hook):
                del module._forward_pre_hooks[number]
    return copied


def hooked(model: nn.Module) -> list[str]:
    """Qualified names of the modules that have forward hooks of the user."""
    return [
        name
        for name, module in model.named_modules()
        if not all(is_capture(hook) for hook in module._forward_hooks.values())
        or not all(_computes_parameters(hook) for hook in module._forward_pre_hooks.values())
    ]


def _computes_parameters(hook: object) -> bool:
    """Whether a hook is one of PyTorch's own, which computes a weight before each call, such as that of `weight_norm`."""
    return str(getattr(hook, "__module__", "")).startswith("torch.nn.utils.")


def _copied(model: nn.Module, shared: list[Tensor]) -> nn.Module:
    """A copy that shares these tensors and the user's hooks, which may hold what he reads later.

    Computed tensors that modules keep (a cached activation, a normalised weight) cannot be copied, so they are shared too.
    """
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*shared, *(t for t in kept if not t.is_leaf)]}
    for module in model.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not isinstance(getattr(hook, "__self__", None), nn.Module):  # a module's own method belongs to its copy
                memo[id(hook)] = hook
    plain_modules(model, memo)
    try:
        _copy_modules(model, memo)
        copied = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise ArgumentError(f"{type(model).__name__} holds something that cannot be copied: {first_line(error)}") from error
    set_flags(copied, flags_of(model))
    return copied


def _copy_modules(model: nn.Module, memo: dict[int, Any]) -> None:
    """Copies modules into `memo` as `copy.deepcopy` would, in a third of the time. It copies those that copy themselves."""
    plain = [module for module in _plain_modules(model, set()) if id(module) not in memo]
    copies = {module: object.__new__(type(module)) for module in plain}
    memo.update({id(module): copied for module, copied in copies.items()})
    for module, copied in copies.items():
        vars(copied).update({name: _copied_value(value, memo) for name, value in vars(module).items()})


def _copied_value(value: object, memo: dict[int, Any]) -> object:
    """What `copy.deepcopy` gives, sooner for what most attributes of a module are: numbers, names and empty containers."""
    if type(value) in _IMMUTABLE:
        return value
    if type(value) in _CONTAINERS and not value and not getattr(value, "__dict__", None):
        return memo.setdefault(id(value), type(value)())
    return copy.deepcopy(value, memo)


def _plain_modules(module: nn.Module, seen: set[nn.Module]) -> Generator[nn.Module]:
    """Modules that do not copy themselves and do not lie inside one that does, children first."""
    if module in seen or not _copies_plainly(type(module)):
        return
    seen.add(module)
    for child in module.children():
        yield from _plain_modules(child, seen)
    yield module


def _copies_plainly(kind: type[nn.Module]) -> bool:
    """Whether a class of modules leaves copying to Python and `nn.Module`."""
    own = (
        "__deepcopy__",
        "__reduce__",
        "__reduce_ex__",
        "__getstate__",
        "__setstate__",
        "__getnewargs__",
        "__getnewargs_ex__",
        "__new__",
    )
    slots = any(vars(base).get("__slots__") for base in kind.__mro__)
    return not slots and all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in own)


def flags_of(model: nn.Module) -> dict[str, bool]:
    """The training flag of every module, by qualified name."""
    return {name: module.training for name, module in model.named_modules(remove_duplicate=False)}


def set_flags(model: nn.Module, flags: Mapping[str, bool]) -> None:
    """Gives modules these training flags, by qualified name. Names that the model does not have are ignored.

    A class may copy itself in another mode, as graph modules do that hold a graph for each. So `train` is called where a flag
    changes: such a class changes more than its flag.
    """
    modules = [(module, flags[name]) for name, module in model.named_modules(remove_duplicate=False) if name in flags]
    for module, flag in modules:  # parents first
        if module.training != flag:
            module.train(flag)
    for module, flag in modules:  # what parents did to their children
        module.training = flag


@contextmanager
def faking(mode: FakeTensorMode, root: nn.Module | None = None) -> Generator[None]:
    """Runs the body on fake tensors, without gradients. A refused shape is a normal result here, so torch does not log it.

    Args:
        mode: The mode of the fake tensors.
        root: A scratch copy whose parameters are fake in the body.
    """
    parameters = nullcontext() if root is None else fake_parameters(root, mode)
    with without_log(FakeTensorMode.__module__), torch.no_grad(), parameters, mode:
        yield


@contextmanager
def fake_parameters(root: nn.Module, mode: FakeTensorMode) -> Generator[None]:
    """Makes the parameters of a scratch copy fake in the body. No fake tensor is left in caches beside its code.

    With real ones results are the same, but torch makes fakes of them anew for each operation, and caches no result: that takes
    three times as long.
    """
    plain = (nn.Parameter, Tensor)  # subclasses convert themselves
    own = [module._parameters for module in root.modules() if not isinstance(module, torch.jit.ScriptModule)]
    before = [dict(parameters) for parameters in own]
    for parameters in own:
        fakes = {name: fake_of(p, mode) for name, p in parameters.items() if p is not None and type(p) in plain}
        parameters.update(cast("dict[str, nn.Parameter]", fakes))
    try:
        yield
    finally:
        for parameters, real in zip(own, before, strict=True):
            parameters.update(real)
        remove_fakes(root, mode)


def fake_like(images: Tensor, batch: int) -> tuple[FakeTensorMode, Tensor]:
    """A fake mode that accepts real parameters, and fake images: `batch` samples shaped like `images`."""
    mode = fake_mode()
    return mode, fake_images(mode, images, batch)


def fake_images(mode: FakeTensorMode, images: Tensor, batch: int) -> Tensor:
    """Fake images of a mode: `batch` samples shaped like `images`."""
    with mode:
        return torch.empty((batch, *images.shape[1:]), dtype=images.dtype, device=images.device)
