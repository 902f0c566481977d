"""Modules whose weights lie elsewhere until they are called, as `accelerate.cpu_offload` arranges it, as if they were bare.

Each module holds parameters without content (on the meta device). A wrapper of its `forward` brings the weights, and takes them
away. Where only shapes are asked for, parameters without content serve, and nothing need be brought.
"""

from __future__ import annotations

import inspect

from torch import nn


def is_offloaded(model: nn.Module) -> bool:
    """Whether parameters have no content now. Either a wrapper brings it, or the model was built without."""
    return any(parameter.is_meta for parameter in model.parameters())


def leave_without_content(root: nn.Module) -> None:
    """Moves a scratch copy to the meta device, without the wrappers that would bring weights to it."""
    for module in root.modules():
        forward = vars(module).get("forward")
        if forward is not None and _innermost(forward) is _innermost(type(module).forward):
            del vars(module)["forward"]
    root.to("meta")


def _innermost(forward: object) -> object:
    """The function that wrappers surround."""
    method = inspect.unwrap(forward)  # pyright: ignore[reportArgumentType, reportUnknownVariableType]
    return getattr(method, "__func__", method)  # pyright: ignore[reportUnknownArgumentType]
