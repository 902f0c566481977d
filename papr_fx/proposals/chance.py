"""Maps by chance: what a map that knows nothing of the task would keep. No network runs, so it costs 0 MACs.

Scores follow from the image's own numbers by whole-number arithmetic, which is exact. So an image has the same scores in any
batch, process and order, on any device, compiled or not, and no generator of random numbers is touched. Different images have
unrelated scores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .network import Preparation, SignificanceNet

_PRIME = 2**31 - 1  # its square fits int64
_WEIGHTS = 65521  # a prime below 2**16


class ChanceNet(SignificanceNet):
    """Maps images (B, C, H, W) or clips to unrelated scores, one for each cell of pixels: (B, h, w), or (B, t, h, w)."""

    fine = True  # coarser grids take means over their cells, so that they agree with finer ones

    def __init__(self, layout: str, cell: tuple[int, ...]) -> None:
        """Takes the axes of images or clips, BCHW, BCTHW or BTCHW, and the (frames,) rows and columns of a cell."""
        super().__init__(nn.Identity(), nn.Identity(), Preparation(layout))
        self.cell = cell

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        extent = [size for size, letter in zip(images.shape, self.layout, strict=True) if letter in "THW"]
        return scattered(seeds(images), [size // cell for size, cell in zip(extent, self.cell, strict=True)])


def seeds(images: Tensor) -> Tensor:
    """A number (B, 1) below 2**31 - 1 for each image (B, ...), by what it shows and where."""
    # Rounded one by one and summed as whole numbers: sums of floats depend on the order that a device takes.
    levels = (4096 * images.flatten(1).float()).round().long()
    place = torch.arange(levels.shape[1], device=images.device)
    return (levels * (place * place % _WEIGHTS)).sum(1, keepdim=True) % _PRIME


def scattered(seed: Tensor, grid: list[int]) -> Tensor:
    """Scores (B, *grid) in [0, 1) that are unrelated between positions, and between seeds (B, 1)."""
    numbers = torch.arange(1, math.prod(grid) + 1, device=seed.device)
    mixed = (48271 * seed + 69621 * numbers) % _PRIME
    for _ in range(3):
        mixed = (mixed * mixed + numbers + seed) % _PRIME
    wide = torch.float32 if seed.device.type == "mps" else torch.float64  # MPS has no float64
    return (mixed.to(wide) / _PRIME).view(-1, *grid)
