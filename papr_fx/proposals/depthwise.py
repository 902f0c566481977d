"""Depthwise convolutions of a frozen network, written for CUDA as sums of shifted images.

A library's depthwise convolution reads and writes memory, and so do the bias and activation kernels around it. The compiler
fuses a sum of nine shifted products with them into one kernel. The proposal is bound by memory, and so moves half the bytes.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MOST_TAPS = 9  # the 25 reads of a 5 x 5 kernel would be bound by the cache


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution whose kernel lies in memory tap by tap, so that neighbouring channels are read together."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """Takes the kernel and bias of a depthwise convolution."""
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            cast("tuple[int, int]", conv.kernel_size),
            cast("tuple[int, int]", conv.stride),
            conv.padding,  # pyright: ignore[reportArgumentType]
            groups=conv.groups,
            bias=conv.bias is not None,
            device="meta",
        )
        taps = conv.weight.detach().permute(2, 3, 0, 1).contiguous()  # (kh, kw, C, 1)
        self.weight = nn.Parameter(taps.permute(2, 3, 0, 1), conv.weight.requires_grad)
        self.bias = conv.bias
        self.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and input.is_cuda:
            return add_shifted(self, input)
        return super().forward(input)


def add_shifted(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Computes a depthwise convolution of images (B, C, H, W) as a sum over the taps of its kernel."""
    pads = cast("tuple[int, int]", conv.padding)
    steps, kernel = conv.stride, conv.kernel_size
    padded = F.pad(x, (pads[1], pads[1], pads[0], pads[0]))
    ends = [
        (size + 2 * pad - taps) // step * step + 1
        for size, pad, taps, step in zip(x.shape[2:], pads, kernel, steps, strict=True)
    ]
    total = torch.zeros((), dtype=x.dtype, device=x.device) if conv.bias is None else conv.bias.view(1, -1, 1, 1)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            shifted = padded[:, :, i : i + ends[0] : steps[0], j : j + ends[1] : steps[1]]
            total = total + shifted * conv.weight[:, 0, i, j].view(1, -1, 1, 1)
    return total


def replace_depthwise(network: nn.Module) -> None:
    """Replaces every small depthwise convolution of `network` by a `DepthwiseConv2d`."""
    for name, module in list(network.named_modules()):
        if name and type(module) is nn.Conv2d and _is_small_depthwise(module):
            network.set_submodule(name, DepthwiseConv2d(module))


def _is_small_depthwise(conv: nn.Conv2d) -> bool:
    """Whether a convolution is depthwise, zero-padded, undilated, and of at most `_MOST_TAPS` taps."""
    depthwise = conv.groups == conv.in_channels == conv.out_channels > 1
    plain = not isinstance(conv.padding, str) and conv.padding_mode == "zeros" and set(conv.dilation) == {1}
    return depthwise and plain and 1 < math.prod(conv.kernel_size) <= _MOST_TAPS
