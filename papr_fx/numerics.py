"""How outputs are compared: relative to the largest expected value, with float32 products at full precision."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree


@contextmanager
def exact_float32() -> Generator[None]:
    """Full float32 products on CUDA: TF32's 10 bits of mantissa would drown the differences sought."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def tensors_of(output: object) -> list[torch.Tensor]:
    """The tensors in a model's output, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def relative_error(actual: Any, expected: Any) -> float:
    """Largest |actual - expected| over largest |expected|, the worst over all tensors; infinite where shapes differ."""
    pairs = list(zip(tensors_of(actual), tensors_of(expected), strict=False))
    if not pairs or len(tensors_of(actual)) != len(tensors_of(expected)) or any(a.shape != e.shape for a, e in pairs):
        return float("inf")
    errors = [((a - e).abs().max() / e.abs().max().clamp_min(torch.finfo(e.dtype).tiny)).item() for a, e in pairs]
    return float("nan") if any(error != error for error in errors) else max(errors)
