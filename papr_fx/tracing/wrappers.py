"""Wrappers: a module that holds nearly all of its parameters in one child."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_NEARLY_ALL = 0.9


def unwrapped(module: nn.Module) -> Iterator[nn.Module]:
    """The module, then the child that holds nearly all of its parameters, then that one's, and so on."""
    inner: nn.Module | None = module
    while inner is not None:
        yield inner
        inner = _main_child(inner)


def _main_child(module: nn.Module) -> nn.Module | None:
    """The child that holds nearly all parameters, if there is one."""
    total = _size(module)
    return next((child for child in module.children() if total and _size(child) >= _NEARLY_ALL * total), None)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
