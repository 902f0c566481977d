"""How outputs are compared: relative to the largest expected value, with float32 products at full precision."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree


@contextmanager
def exact_float32() -> Generator[None]:
    """Full float32 products: TF32's 10 bits of mantissa, or bfloat16's 7 on a CPU, would drown the differences sought."""
    backends: Any = torch.backends  # its settings are made at run time
    settings = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


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
