"""Toy ViTs whose heads lay their tokens out as their grid, and what they compute of kept tokens, by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import papr_fx

from ..oracles import attention_without, kept_tokens
from .vits import Shape, ToyViT, enliven


class DenseViT(ToyViT):
    """A ViT with a head on its grid (B, C, h, w)."""

    def __init__(self, shape: Shape | None = None) -> None:
        super().__init__(shape or Shape(depth=1))
        self.make()
        enliven(self)

    def make(self) -> None:
        """Makes the layers of the head."""

    def patch_tokens(self, x: Tensor) -> Tensor:
        return self.norm(x)[:, self.shape.prefix :]

    def grid(self, x: Tensor) -> Tensor:
        return self.patch_tokens(x).reshape(x.shape[0], *self.shape.grid, -1).permute(0, 3, 1, 2)

    def on_grid(self, grid: Tensor) -> Tensor:
        return grid

    def classify(self, x: Tensor) -> Tensor:
        return self.on_grid(self.grid(x))


class ConvDecoder(DenseViT):
    """Upsamples the grid to a map of three channels."""

    def make(self) -> None:
        self.mix = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 3, 2, 2)

    def on_grid(self, grid: Tensor) -> Tensor:
        return self.up(F.gelu(self.mix(grid)))


def fill_by_hand(mask: Tensor) -> Tensor:
    """For each cell of masks (B, *grid), the nearest one that is True, the first in order if several are: (B, n)."""
    cells = list(product(*map(range, mask.shape[1:])))
    found = []
    for sample in mask.flatten(1).tolist():
        kept = [number for number, is_kept in enumerate(sample) if is_kept]
        distances = [[sum((a - b) ** 2 for a, b in zip(cell, cells[k], strict=True)) for k in kept] for cell in cells]
        found.append([kept[row.index(min(row))] for row in distances])
    return torch.tensor(found)


def by_hand(model: DenseViT, gm: nn.Module, x: Tensor, *, zero: bool) -> Tensor:
    """Kept tokens through the blocks, each put in its place; dropped places hold the nearest one, or zero."""
    ((_, mask),) = papr_fx.keep_masks(gm, x).items()
    prefix = model.shape.prefix
    tokens = model.tokens(x)
    kept = torch.stack([sample[index] for sample, index in zip(tokens, kept_tokens(mask, prefix), strict=True)])
    for block in model.blocks:
        kept = block(kept)
    patches = model.patch_tokens(kept)
    grid = torch.zeros(len(x), 8, *mask.shape[1:], dtype=x.dtype)
    for sample, nearest in enumerate(fill_by_hand(mask)):
        order = [cell for cell, is_kept in enumerate(mask[sample].flatten().tolist()) if is_kept]
        for cell, source in enumerate(nearest.tolist()):
            if source == cell or not zero:
                grid[sample, :, cell // mask.shape[2], cell % mask.shape[2]] = patches[sample, order.index(source)]
    return model.on_grid(grid)


@contextmanager
def filled_by_hand(model: nn.Module, blocks: list[str], mask: Tensor, prefix: int) -> Iterator[None]:
    """While active, dropped tokens are hidden from every attention, and each leaves every block as its nearest kept one."""
    rows = torch.cat([torch.arange(prefix).expand(len(mask), prefix), fill_by_hand(mask) + prefix], dim=1)

    def fill(_module, _args, out):
        tokens = out[0] if isinstance(out, tuple) else out
        tokens = torch.stack([sample[index] for sample, index in zip(tokens, rows, strict=True)])
        return (tokens, *out[1:]) if isinstance(out, tuple) else tokens

    handles = [model.get_submodule(name).register_forward_hook(fill, prepend=True) for name in blocks]
    hidden = torch.cat([torch.zeros(len(mask), prefix, dtype=torch.bool), ~mask.flatten(1)], dim=1)
    try:
        with attention_without(hidden) as attention:
            yield
        assert attention.seen
    finally:
        for handle in handles:
            handle.remove()
