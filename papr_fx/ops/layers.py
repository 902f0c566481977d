"""What must hold of a layer whose weights an operator uses without calling it."""

from __future__ import annotations

from torch import nn


def is_plain(layer: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a layer is of exactly one of these classes, is not watched, and its weight is a plain tensor.

    A layer that is adapted, quantised, sharded or offloaded is not. Its own call must then be made.
    """
    return type(layer) in kinds and not is_watched(layer) and not hasattr(layer.weight, "__tensor_flatten__")


def is_watched(layer: nn.Module) -> bool:
    """Whether calling a module runs more than its class says: hooks, or a method that was put on it."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks) or "forward" in layer.__dict__ or "_conv_forward" in layer.__dict__
