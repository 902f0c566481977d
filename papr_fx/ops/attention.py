"""What a fused attention adds to its scores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor

from ..errors import ArgumentError


def attention_mask(queries: Tensor, terms: Sequence[Tensor], per_window: Sequence[Tensor] = ()) -> Tensor:
    """The sum of all that is added to scores, as `F.scaled_dot_product_attention` takes it fastest: with four axes.

    Terms are added while they are small. Only what differs between windows is repeated for each image.

    Args:
        queries: (B, heads, N, D), whose dtype the sum gets.
        terms: Each of them broadcasts to the scores (B, heads, N, M). With `per_window`, they have no axis of images.
        per_window: Each of them broadcasts to (1, windows, heads, N, M). B is a multiple of the windows.

    Raises:
        ArgumentError: One has no content: a module that is not called owns it, and who offloads weights brings those of modules
            that are.
    """
    if not queries.is_meta and any(term.is_meta for term in (*terms, *per_window)):
        raise ArgumentError(
            "sought what attention adds to its scores, found a tensor without content (meta device): its module is not called, "
            "so its weights were not brought. Pass fuse=False to transform, which leaves attention to its module, or bring all "
            "weights at the start (accelerate: preload_module_classes)"
        )
    if not per_window:
        mask = reduce(add, terms)
        return _converted(mask[(None,) * (4 - mask.ndim)], queries.dtype)
    mask = reduce(add, [*per_window, *terms])[(None,) * (5 - max(term.ndim for term in (*per_window, *terms)))]
    mask = _converted(mask, queries.dtype).flatten(0, 1)  # (windows, heads, N, M)
    return mask.repeat(queries.shape[0] // mask.shape[0], 1, 1, 1)


def _converted(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask in a dtype. What is out of its range stays finite, so that a row that is masked throughout keeps its weights."""
    if mask.dtype == dtype or not dtype.is_floating_point:
        return mask.to(dtype)
    return mask.clamp(min=torch.finfo(dtype).min).to(dtype)
