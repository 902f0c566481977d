"""Where a grid of positions becomes a token axis: found by watching which axes an operation flattens."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.positions import count_windows
from ..versions import TorchDispatchMode


class Join(NamedTuple):
    """Where several axes became one.

    Attributes:
        grid: Their sizes.
        axes: Their places in the tensor that was flattened.
        windows: Offset and step of the windows along these axes where an image was unfolded, otherwise empty.
    """

    grid: tuple[int, ...]
    axes: tuple[int, ...]
    windows: tuple[tuple[int, int], ...] = ()


class RecordJoins(TorchDispatchMode):
    """Records where an operation flattens adjacent axes of an activation.

    Attributes:
        joins: What was flattened, per sample.
        folded: The same while frames are in the batch axis, each with the number of frames of a sample.
        random: Whether an operation drew random numbers.
    """

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.joins: list[Join] = []
        self.folded: list[tuple[int, Join]] = []
        self.random = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.random |= draws(func)
        if func is torch.ops.aten.im2col.default:
            self.joins.append(_unfolded(*args))
        elif args and isinstance(args[0], Tensor) and isinstance(out, Tensor) and out.dtype == args[0].dtype:
            before, after = tuple(args[0].shape), tuple(out.shape)
            frames = before[0] // self.batch if before and before[0] % self.batch == 0 else 1
            if frames > 1 and before[:1] == after[:1]:
                self.folded.extend((frames, join) for join in _joined(before, after, before[0]))
            if frames > 1 and after[:1] == (self.batch,):
                before = (self.batch, frames, *before[1:])
            groups = _joined(before, after, self.batch)
            self.joins.extend(reversed(groups))  # a reshape may flatten positions and channels at once: positions come first
        return out


class WatchDraws(TorchDispatchMode):
    """Notes whether random numbers are drawn while `watches()` is true, in this thread."""

    def __init__(self, watches: Callable[[], bool]) -> None:
        super().__init__()
        self.watches = watches
        self.drew = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.drew |= draws(func) and self.watches()
        return func(*args, **(kwargs or {}))


def draws(func: Any) -> bool:
    """Whether an operator draws random numbers."""
    return torch.Tag.nondeterministic_seeded in func.tags


def _unfolded(image: Tensor, kernel: list[int], dilation: list[int], padding: list[int], stride: list[int]) -> Join:
    axes = zip(image.shape[-2:], kernel, dilation, padding, stride, strict=True)
    windows = [(size, 2 * pad - dil * (ker - 1) - 1, step) for size, ker, dil, pad, step in axes]
    grid = tuple(count_windows(*window) for window in windows)
    return Join(grid, (image.ndim - 2, image.ndim - 1), tuple((offset, step) for _, offset, step in windows))


def _joined(before: tuple[int, ...], after: tuple[int, ...], batch: int) -> list[Join]:
    """The groups of adjacent axes that a reshape of a batch flattened, without axes of size 1; empty for other operations."""
    if before[:1] != (batch,) or after[:1] != (batch,):
        return []
    axes = [axis for axis, size in enumerate(before) if axis and size != 1]
    groups: list[Join] = []
    for size in after[1:]:
        count = 0 if size == 1 else 1
        while count < len(axes) and prod(before[axis] for axis in axes[:count]) < size:
            count += 1
        if prod(before[axis] for axis in axes[:count]) != size:
            return []
        groups.append(Join(tuple(before[axis] for axis in axes[:count]), tuple(axes[:count])))
        del axes[:count]
    return [] if axes else [group for group in groups if len(group.grid) > 1]
