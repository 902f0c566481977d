"""Whether an operation may run on a grid of k rows and one column in the place of the whole grid, as pooling may.

It is asked of ATen operations. All that are not known to treat positions alike, whatever their number and order, may not.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any

import torch

from ..versions import TorchDispatchMode

# Operations that change shapes only. Slices are none of them: they pick positions.
_VIEWS = ("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand")
_COPIES = ("alias", "detach", "clone", "contiguous", "_to_copy", "copy_", "lift_fresh", "cat", "stack", "split")
# Products and norms: over channels, or over as many positions as there are.
_SUMS = ("mm", "addmm", "bmm", "baddbmm", "native_layer_norm", "_fused_rms_norm", "linalg_vector_norm", "native_dropout")
_BATCH_NORMS = ("native_batch_norm", "_native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm")
_POOLING = ("mean", "sum", "amax", "amin", "std", "var", "native_group_norm")
_ATTENTION = ("_softmax", "_log_softmax", "_safe_softmax", "_scaled_dot_product")
_WINDOWS = ("avg_pool", "max_pool")
_FACTORIES = ("empty", "new_empty", "zeros", "ones", "full", "new_zeros", "new_ones", "scalar_tensor", "zero_", "fill_")
_PLAIN = frozenset((*_VIEWS, *_COPIES, *_SUMS, *_POOLING, *_FACTORIES))


class WatchPositions(TorchDispatchMode):
    """Notes an operation that may depend on the places of positions.

    Args:
        kept: Rows of the column.

    Attributes:
        mixing: Its name; empty if there is none.
    """

    def __init__(self, kept: int) -> None:
        super().__init__()
        self._kept = kept
        self.mixing = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket).removeprefix("aten.")
        if not self._treats_alike(func, name, args):
            self.mixing = self.mixing or name
        return func(*args, **(kwargs or {}))

    def _treats_alike(self, func: Any, name: str, args: Any) -> bool:
        if name in _PLAIN or name.startswith((*_BATCH_NORMS, "prim.")) or torch.Tag.pointwise in func.tags:
            return True
        if name == "convolution":
            _, weight, _, stride, padding, *_ = args
            return prod(weight.shape[2:]) == 1 and set(stride) == {1} and set(padding) == {0}
        if name == "as_strided_":  # with which pooling ends
            return prod(args[1]) == args[0].numel()
        if name.startswith(_WINDOWS):
            return list(args[1]) == list(args[0].shape[-len(args[1]) :])  # one window, as large as the grid
        # An attention over tokens; not a softmax over rows or columns of the grid.
        return name.startswith(_ATTENTION) and (self._kept, 1) not in pairwise(args[0].shape)
