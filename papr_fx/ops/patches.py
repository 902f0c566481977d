"""The embedding of some patches of an image, where a convolution with touching windows embeds all of them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import is_plain
from .positions import flat_rows


def patch_grid(sizes: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Sizes of the grid of whole patches in an image of these sizes; pixels that are left over belong to none."""
    return tuple(size // pixels for size, pixels in zip(sizes, patch, strict=True))


def embed_patches(images: Tensor, keep: Tensor, conv: nn.Module) -> Tensor:
    """Embeds the kept patches as a convolution would whose stride is its kernel's size: one matrix product.

    A library's convolution of three channels is slow, on a GPU above all (docs/speed.md). The convolution is called, for all
    patches, once it is more than a plain one: adapted, quantised or watched by hooks.

    Args:
        images: (B, C, H, W), or clips (B, C, T, H, W).
        keep: Kept patches (B, k), numbered row by row.
        conv: The convolution; its weight is (D, C, p, q) or (D, C, s, p, q).

    Returns:
        (B, D, H // p, W // q), or (B, D, T // s, H // p, W // q). In the place of a dropped patch stands a kept one: zeros
        would make gradients of a norm infinite there.
    """
    if not is_plain(conv, nn.Conv2d, nn.Conv3d) or not is_touching(conv):
        return conv(images)
    conv = cast("nn.Conv2d | nn.Conv3d", conv)
    grid = patch_grid(images.shape[2:], conv.kernel_size)
    cells = _embedded(_kept_pixels(images, keep, grid, conv.kernel_size), keep, prod(grid), conv)
    return cells.unflatten(1, grid).movedim(-1, 1)


def embed_quads(
    images: Tensor, keep: Tensor, conv: nn.Module, halved: Tensor, members: Tensor, suffix: int = 0
) -> tuple[Tensor, Tensor]:
    """Embeds kept patches and kept quads, each once, as a convolution would embed all patches of two batches of images.

    Args:
        images: (B, C, H, W), or clips (B, C, T, H, W).
        keep: What is kept, (B, k): patches, numbered row by row, and n + suffix + q for quad q of n patches.
        conv: The convolution; its weight is (D, C, p, q) or (D, C, s, p, q).
        halved: Images in which every patch holds its quad at half size.
        members: The patches of each quad, (c, 4).
        suffix: Tokens behind the patches, which only shift the numbers of quads.

    Returns:
        Two grids (B, D, H // p, W // q) or (B, D, T // s, H // p, W // q): of `images`, and of `halved`. In the place of what
        is not kept stands something else that is.
    """
    if not is_plain(conv, nn.Conv2d, nn.Conv3d) or not is_touching(conv):
        return conv(images), conv(halved)
    conv = cast("nn.Conv2d | nn.Conv3d", conv)
    patch = conv.kernel_size
    grid = patch_grid(images.shape[2:], patch)
    count, quads = prod(grid), members.shape[0]
    quad = (keep - (count + suffix)).clamp(min=0)
    coarse = keep >= count
    cells = torch.where(coarse, members[:, 0][quad], keep)
    is_quad = coarse.view(*coarse.shape, *[1] * (1 + len(patch)))
    pixels = torch.where(is_quad, _kept_pixels(halved, cells, grid, patch), _kept_pixels(images, cells, grid, patch))
    kept = _embedded(pixels, torch.where(coarse, count + quad, keep), count + quads, conv)
    numbers = torch.arange(quads, device=keep.device).repeat_interleave(4)
    quad_of = torch.zeros(count, dtype=torch.int64, device=keep.device).scatter(0, members.flatten(), numbers)
    both = kept[:, :count], kept.index_select(1, count + quad_of)
    first, second = (value.unflatten(1, grid).movedim(-1, 1) for value in both)
    return first, second


def _embedded(pixels: Tensor, rows: Tensor, count: int, conv: nn.Conv2d | nn.Conv3d) -> Tensor:
    """Pixels (B, k, C, *patch), embedded and put in their rows (B, k) of (B, count, D); other rows hold the first of them."""
    kept = F.linear(pixels.flatten(2), conv.weight.flatten(1), conv.bias)  # (B, k, D)
    cells = kept[:, :1].expand(-1, count, -1).flatten(0, 1)
    return cells.index_copy(0, flat_rows(rows, count), kept.flatten(0, 1)).unflatten(0, (-1, count))


def is_touching(conv: nn.Module) -> bool:
    """Whether a convolution's windows touch: its stride is its kernel's size, without padding, gaps or groups."""
    conv = cast("nn.Conv2d | nn.Conv3d", conv)
    plain = conv.groups == 1 and set(conv.dilation) == {1} and (conv.padding == "valid" or set(conv.padding) == {0})
    return plain and conv.kernel_size == conv.stride


def _kept_pixels(images: Tensor, keep: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """The pixels of the kept patches, (B, k, C, *patch)."""
    axes = len(grid)
    for axis, (count, pixels) in enumerate(zip(grid, patch, strict=True)):
        images = images.narrow(2 + axis, 0, count * pixels)
    split = [size for pair in zip(grid, patch, strict=True) for size in pair]
    windows = images.reshape(*images.shape[:2], *split)  # (B, C, h, p, w, q)
    windows = windows.permute(0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2))  # (B, h, w, C, p, q)
    places: list[Tensor] = []
    for axis, size in enumerate(grid):
        along = torch.arange(size, device=keep.device).view(*[1] * axis, size, *[1] * (axes - axis - 1))
        places.append(along.expand(*grid).flatten()[keep])  # (B, k)
    return windows[(torch.arange(keep.shape[0], device=keep.device).unsqueeze(1), *places)]
