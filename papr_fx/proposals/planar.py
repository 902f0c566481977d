"""3-D convolutions of a frozen network whose kernels are flat, written as matrix products and 2-D convolutions.

Networks of clips consist mostly of kernels 1x1x1, 1xhxw and tx1x1. A CPU is slow at them as 3-D convolutions: it unfolds the
clip first. In channels-last memory, the axes along which the kernel is 1 merge without a copy.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

Sizes = tuple[int, int, int]


class PlanarConv3d(nn.Conv3d):
    """A convolution of clips (B, C, t, h, w) whose kernel has size 1 in time, or in both rows and columns."""

    def __init__(self, conv: nn.Conv3d) -> None:
        """Takes the kernel and bias of a convolution for which `is_planar` holds."""
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            cast(Sizes, conv.kernel_size),
            cast(Sizes, conv.stride),
            conv.padding,  # pyright: ignore[reportArgumentType]
            cast(Sizes, conv.dilation),
            conv.groups,
            conv.bias is not None,
            device="meta",
        )
        self.weight = conv.weight
        self.bias = conv.bias
        self.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        padding = cast(Sizes, self.padding)
        rows = input.movedim(1, -1)  # (B, t, h, w, C)
        if self.weight[0, 0].numel() == 1 and set(self.stride) == {1} and not any(padding) and self.groups == 1:
            return F.linear(rows, self.weight.flatten(1), self.bias).movedim(-1, 1)
        in_time = _acts_in_time(self)
        merged = rows.flatten(2, 3) if in_time else rows.flatten(0, 1)  # (B, t, h * w, C) or (B * t, h, w, C)
        out = F.conv2d(
            merged.movedim(-1, 1),
            self.weight.flatten(3) if in_time else self.weight[:, :, 0],
            self.bias,
            (self.stride[0], 1) if in_time else self.stride[1:],
            (padding[0], 0) if in_time else padding[1:],
            (self.dilation[0], 1) if in_time else self.dilation[1:],
            self.groups,
        ).movedim(1, -1)
        whole = out.unflatten(2, rows.shape[2:4]) if in_time else out.unflatten(0, rows.shape[:2])
        return whole.movedim(-1, 1)


def replace_planar(network: nn.Module) -> None:
    """Replaces every convolution of `network` for which `is_planar` holds by a `PlanarConv3d`."""
    for name, module in list(network.named_modules()):
        if name and type(module) is nn.Conv3d and is_planar(module):
            network.set_submodule(name, PlanarConv3d(module))


def is_planar(conv: nn.Conv3d) -> bool:
    """Whether a 3-D convolution acts within each frame, or along time at each position, with zero padding."""
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        return False
    by_frame = (conv.kernel_size[0], conv.stride[0], conv.padding[0]) == (1, 1, 0)
    return by_frame or _acts_in_time(conv)


def _acts_in_time(conv: nn.Conv3d) -> bool:
    """Whether the kernel has size 1 in rows and columns, at stride 1."""
    sizes = cast("tuple[Sizes, ...]", (conv.kernel_size, conv.stride, conv.padding))
    return [size[1:] for size in sizes] == [(1, 1), (1, 1), (0, 0)]
