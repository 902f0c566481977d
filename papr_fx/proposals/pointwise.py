"""Convolutions of one pixel in a frozen network, written for a CPU as matrix products.

In channels-last memory the channels of a pixel lie side by side, so images are a matrix already. On one thread PyTorch would
take a convolution apart image by image, and copy its bias to every pixel of each first.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn


class PointwiseConv2d(nn.Conv2d):
    """A convolution of images (B, C, H, W) whose kernel is one pixel."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """Takes the kernel and bias of a convolution for which `is_pointwise` holds."""
        super().__init__(conv.in_channels, conv.out_channels, 1, bias=conv.bias is not None, device="meta")
        self.weight = conv.weight
        self.bias = conv.bias
        self.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cuda:
            return super().forward(input)
        rows = input.movedim(1, -1)  # (B, H, W, C)
        return F.linear(rows, self.weight.flatten(1), self.bias).movedim(-1, 1)


def replace_pointwise(network: nn.Module) -> None:
    """Replaces every convolution of `network` for which `is_pointwise` holds by a `PointwiseConv2d`."""
    for name, module in list(network.named_modules()):
        if name and type(module) is nn.Conv2d and is_pointwise(module):
            network.set_submodule(name, PointwiseConv2d(module))


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether each pixel of a convolution's result follows from the same pixel of its input, and all of its channels."""
    sizes = cast("tuple[tuple[int, int], ...]", (conv.kernel_size, conv.stride))
    return sizes == ((1, 1), (1, 1)) and conv.groups == 1 and conv.padding in ((0, 0), "valid", "same")
