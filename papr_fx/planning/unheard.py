"""Warns of hooks that would never run: those put on modules that nothing calls.

A trace takes the code of a module into the graph, and attention that became one call takes its softmax and dropout with it.
Their own hooks belong to a call that does not happen.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from ..errors import HookWarning

_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class UnheardHooks(OrderedDict[int, Callable[..., Any]]):
    """The hooks of one kind of a module that nothing calls. To add one warns.

    Args:
        name: Qualified name of the module.
        hooks: Hooks that are there already.
    """

    def __init__(self, name: str, hooks: Mapping[int, Callable[..., Any]]) -> None:
        super().__init__()
        self.name = name
        for number, hook in hooks.items():
            super().__setitem__(number, hook)

    def __setitem__(self, number: int, hook: Callable[..., Any]) -> None:
        warnings.warn(
            f"`{self.name}` was traced through, or is part of attention that became one call, so nothing calls it, and its "
            "hooks do not run: put them on modules inside it that the graph calls (print(gm.graph)), or on the model before "
            "transform(), which keeps a module whole that has hooks. fuse=False leaves attention as it is written, and "
            "narrow=False the last block",
            HookWarning,
            stacklevel=3,
        )
        super().__setitem__(number, hook)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, dict(self))


def warn_of_hooks(root: nn.Module, unheard: Iterable[str]) -> None:
    """Makes modules warn of hooks that are put on them from now on, or on copies of them.

    Args:
        root: A rewritten module.
        unheard: Qualified names of the modules in it that nothing calls.
    """
    for name in unheard:
        module = root.get_submodule(name)
        for table in _TABLES:
            setattr(module, table, UnheardHooks(name, getattr(module, table)))
