"""How outputs are compared: relative to the largest expected value, in full precision, with parameters at unit scale."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, cast

import torch

from ..versions import make_products_exact, tree_leaves
from .surroundings import SharedSetting

# The most numbers that are drawn for a model. A prime: no two parameters start at the same place, and long kernels have no
# equal rows.
_DRAWN = 4_194_301

# Full float32 products. TF32 has 10 bits of mantissa and bfloat16 has 7, too few for the differences sought here.
exact_float32 = SharedSetting(make_products_exact)


@contextmanager
def forked_random(like: torch.Tensor) -> Generator[None]:
    """Restores the random state afterwards, of the CPU and of the device of `like` only: others may be in use."""
    devices = [like.device] if like.device.type in ("cuda", "xpu") else []
    with torch.random.fork_rng(devices, device_type=like.device.type if devices else "cuda"):
        yield


def tensors_of(output: object) -> list[torch.Tensor]:
    """The tensors in a model's output, in order. Dataclasses and classes of dictionaries that torch does not know count too."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts = parts_of(output)
    if parts is None:
        return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    return [tensor for part in parts.values() for tensor in tensors_of(part)]


def parts_of(output: object) -> dict[Any, Any] | None:
    """The parts of a dictionary, sequence or dataclass, by key, place or name; None for any other value."""
    if isinstance(output, Mapping):
        return dict(cast("Mapping[Any, Any]", output))
    if isinstance(output, tuple | list):
        return dict(enumerate(cast("list[Any]", output)))
    if is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name, None) for field in fields(output)}
    return None


def structure_of(output: object) -> object:
    """The classes and keys of an output and its parts, to compare: equal outputs differ in tensors only."""
    parts = parts_of(output)
    kind = "tensor" if isinstance(output, torch.Tensor) else type(output).__qualname__
    return kind if parts is None else (kind, [(key, structure_of(part)) for key, part in parts.items()])


def relative_error(actual: Any, expected: Any) -> float:
    """Largest |actual - expected| over largest |expected|, the worst of all tensors; infinite where shapes differ."""
    pairs = list(zip(tensors_of(actual), tensors_of(expected), strict=False))
    if not pairs or len(tensors_of(actual)) != len(tensors_of(expected)) or any(a.shape != e.shape for a, e in pairs):
        return float("inf")
    errors = [_error(a, e) for a, e in pairs]
    return float("nan") if any(error != error for error in errors) else max(errors)


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if not expected.numel():
        return 0.0
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)).item()


def redraw(model: torch.nn.Module, random: torch.Generator, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Parameters at unit scale and buffers as they are, by qualified name, in `dtype`, on the device of `random`.

    Kernels (two or more axes) keep the variance of their input. Everything else is added or multiplied per channel or
    position (biases, scales, tables of shape (1, N, C)) and is drawn from a standard normal distribution. Each parameter is a
    piece of one long draw: to draw hundreds of millions of numbers takes longer than to run a model. A buffer on the meta
    device is filled with ones, unless it `holds_indices`: those cannot be made up.
    """
    values: dict[str, torch.Tensor] = {}
    used, total = 0, sum(parameter.numel() for parameter in model.parameters())
    numbers = torch.randn(min(total, _DRAWN), generator=random, device=random.device, dtype=dtype)
    drawn: dict[torch.Tensor, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point():
            if parameter not in drawn:
                drawn[parameter] = _scaled(
                    _piece(numbers, used % max(1, len(numbers)), parameter.numel()).view(parameter.shape)
                )
                used += parameter.numel()
            values[name] = drawn[parameter]
    for name, buffer in model.named_buffers(remove_duplicate=False):
        kind = dtype if buffer.is_floating_point() else buffer.dtype
        if buffer.is_meta and not holds_indices(buffer):
            values[name] = torch.ones(buffer.shape, dtype=kind, device=random.device)
        else:
            values[name] = buffer.to(random.device, kind, copy=True)
    return values


def holds_indices(buffer: torch.Tensor) -> bool:
    """Whether `buffer` is a table of integers, such as positions to look up. Unlike scales, these cannot be made up."""
    return not buffer.is_floating_point() and buffer.ndim > 0


def unit_scale(shape: Sequence[int], random: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """A parameter of that shape at unit scale, on the device of `random`."""
    return _scaled(torch.randn(tuple(shape), generator=random, device=random.device, dtype=dtype))


def _scaled(drawn: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers as a parameter of their shape, in place."""
    kernel = drawn.ndim >= 2 and drawn.shape[0] > 1
    return drawn.mul_(math.prod(drawn.shape[1:]) ** -0.5) if kernel else drawn


def _piece(numbers: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """A copy of `count` consecutive numbers from a place on. Behind the last one the first follows."""
    rounds = (start + count) // max(1, len(numbers))
    return torch.cat([numbers[start : start + count], *[numbers] * rounds])[:count]
