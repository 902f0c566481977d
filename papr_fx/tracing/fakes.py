"""Copies of a model to experiment on, and fake images to run them with."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import ArgumentError, first_line
from .surroundings import without_log

# Samples of the fake images while tracing. Not 1: broadcasting would hide which sizes follow the batch.
TRACED_BATCH = 2

# What the code of a model raises for inputs that it does not take.
MODEL_ERRORS = (RuntimeError, ValueError, AssertionError, TypeError, IndexError, AttributeError)


def aliased_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every parameter and buffer, but not flags and hooks.

    Raises:
        ArgumentError: The model holds something that cannot be copied.
    """
    return _copied(model, [*model.parameters(), *model.buffers()])


def scratch_copy(model: nn.Module) -> nn.Module:
    """A copy to run on fake tensors: it shares parameters only, and calls no forward hooks.

    In-place operations on a small buffer, such as a batch count, run even on fake tensors, so buffers are copied.
    """
    copied = _copied(model, list(model.parameters()))
    for module in copied.modules():
        module._forward_hooks.clear()
    return copied


def _copied(model: nn.Module, shared: list[Tensor]) -> nn.Module:
    """Computed tensors that modules keep (a cached activation, a normalised weight) cannot be copied, so they are shared."""
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*shared, *(t for t in kept if not t.is_leaf)]}
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise ArgumentError(f"{type(model).__name__} holds something that cannot be copied: {first_line(error)}") from error


@contextmanager
def faking(mode: FakeTensorMode) -> Generator[None]:
    """Runs the body on fake tensors, without gradients. A refused shape is a normal result here, so torch does not log it."""
    with without_log(FakeTensorMode.__module__), torch.no_grad(), mode:
        yield


def fake_like(images: Tensor, batch: int) -> tuple[FakeTensorMode, Tensor]:
    """A fake mode that accepts real parameters, and fake images: `batch` samples shaped like `images`."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        return mode, torch.empty((batch, *images.shape[1:]), dtype=images.dtype, device=images.device)
