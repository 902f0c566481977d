"""What happens inside a copy of a model while it is traced: calls of modules and reads of tensors go to the tracer.

`torch.fx` patches `nn.Module` for this, and with it every module of every thread. Here each module of the copy is changed by
itself: Python finds what an instance holds before what its class defines.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .own_names import OwnNames

# What `nn.Module.__call__` calls instead of the module, where an instance has one.
_CALL = "_compiled_call_impl"
_TENSORS = ("_parameters", "_buffers")
_NOTHING = object()


class _Read(dict[str, Tensor | None]):
    """Tensors of a module. Its code reads them by name, and gets what `read` makes of them."""

    def __init__(self, tensors: Mapping[str, Tensor | None], read: Callable[[str, Any], Any]) -> None:
        super().__init__(tensors)
        self._read = read

    def __getitem__(self, name: str) -> Any:
        return self._read(name, super().__getitem__(name))


@contextmanager
def opened_modules(
    root: nn.Module,
    call: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any],
    read: Callable[[str, Any], Any],
    own: OwnNames,
) -> Generator[None]:
    """While active, modules of `root` are called and their tensors read through the tracer, and their methods see other names.

    Args:
        root: A copy of a model, for one thread.
        call: Called with a module and its arguments.
        read: Called with the name of a parameter or buffer, and its value.
        own: The names that methods see.
    """
    changes = [(module, _open(module, call, read, own)) for module in root.modules()]
    try:
        yield
    finally:
        for module, added in changes:
            _close(module, added)


def _open(
    module: nn.Module, call: Callable[..., Any], read: Callable[[str, Any], Any], own: OwnNames
) -> dict[str, tuple[Any, Any]]:
    """Changes a module. Returns by name what it held, and what it now holds."""
    held = vars(module)
    added: dict[str, Any] = {_CALL: lambda *args, **kwargs: call(module, args, kwargs)}  # pyright: ignore[reportUnknownLambdaType]
    if not isinstance(module, torch.jit.ScriptModule):  # its code is not Python
        added |= {name: bind(module) for name, bind in own.methods(type(module)).items() if name not in held}
        added |= {name: seen for name, value in held.items() if (seen := own.value({}, name, value)) is not value}
        added |= {name: _Read(held[name], read) for name in _TENSORS}
    changes = {name: (held.get(name, _NOTHING), value) for name, value in added.items()}
    held.update(added)
    return changes


def _close(module: nn.Module, changes: dict[str, tuple[Any, Any]]) -> None:
    """Takes the changes back. What the model's code stored meanwhile stays."""
    held = vars(module)
    for name, (before, value) in changes.items():
        if isinstance(value, _Read):
            before.clear()
            before.update(value)
        if held.get(name) is not value:
            continue
        if before is _NOTHING:
            del held[name]
        else:
            held[name] = before
