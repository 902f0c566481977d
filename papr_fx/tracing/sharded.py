"""Modules whose parameters are spread over processes (`torch.distributed.fsdp.fully_shard`), as if they were whole.

Such a module has a class that PyTorch makes, which refuses to be copied. Outside its own forward it holds parts of parameters.
Where only shapes are asked for, neither matters.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

# Where PyTorch keeps the state of `fully_shard` in a module.
_STATE = "__composable_api_state_key"
_SHARDED = "FSDPModule"


def plain_modules(model: nn.Module, memo: dict[int, Any]) -> None:
    """Copies the sharded modules of `model` as modules of their first class, into `memo` for `copy.deepcopy`.

    The hooks that gather and shard parameters are left behind.
    """
    copies = [(module, _plain(module)) for module in model.modules() if _is_sharded(module)]
    memo.update({id(module): copied for module, copied in copies})
    hooks = vars(nn.Module()).keys() - {"training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
    for module, copied in copies:
        own = {name: value for name, value in vars(module).items() if name not in hooks and not name.startswith(_STATE)}
        vars(copied).update({name: copy.deepcopy(value, memo) for name, value in own.items()})


def stand_in_for_shards(root: nn.Module) -> None:
    """Replaces parameters in parts by empty ones of the whole shape, which take no memory."""
    for module in root.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and _is_part(parameter):
                whole = torch.empty((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(whole, requires_grad=parameter.requires_grad)


def has_parts(module: nn.Module) -> bool:
    """Whether this process holds parts of parameters now that no submodule gathers by itself where it is called."""
    own = any(_is_part(parameter) for parameter in module.parameters(recurse=False))
    return own or any(has_parts(child) for child in module.children() if not _is_sharded(child))


def _is_part(parameter: Tensor) -> bool:
    return hasattr(parameter, "full_tensor")


def _is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to a module."""
    return any(kind.__name__ == _SHARDED for kind in type(module).__mro__)


def _plain(module: nn.Module) -> nn.Module:
    """An empty module of the class that this one had before."""
    names = [kind.__name__ for kind in type(module).__mro__]
    kind = type(module).__mro__[names.index(_SHARDED) + 1]
    plain = cast(nn.Module, object.__new__(kind))
    nn.Module.__init__(plain)
    return plain
