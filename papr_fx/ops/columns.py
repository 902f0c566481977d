"""Linear layers of which only some outputs are computed."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import is_plain


def linear_columns(x: Tensor, layer: nn.Module, start: int, stop: int) -> Tensor:
    """Some outputs of a linear layer: (..., C) becomes (..., stop - start).

    The layer is asked for all outputs, of which some are taken, once it is more than a plain one: adapted, quantised or
    watched by hooks.

    Args:
        x: What the layer gets.
        layer: The layer.
        start: Its first output.
        stop: The end of its outputs.
    """
    if not is_plain(layer, nn.Linear):
        return layer(x)[..., start:stop]
    layer = cast(nn.Linear, layer)
    bias = cast("Tensor | None", layer.bias)
    return F.linear(x, layer.weight[start:stop], None if bias is None else bias[start:stop])


def split_columns(x: Tensor, start: int, sizes: Sequence[int], order: Sequence[int]) -> Tensor:
    """Columns of (B, N, M) from `start` on, split into axes of these sizes; then all axes are permuted.

    Queries of 6 heads of 64 columns, (B, 6, N, 64), have sizes (6, 64) and order (0, 2, 1, 3).
    """
    columns = x[..., start : start + prod(sizes)]
    return columns.unflatten(-1, tuple(sizes)).permute(tuple(order))
