"""Finds out which tokens follow which patches of an image: by filling patches with NaN, whatever the weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from ..errors import NoSiteError, TraceError, first_line
from ..ops import TokenRows
from ..tracing.fakes import MODEL_ERRORS
from ..tracing.graphs import ancestors, shape_of
from ..tracing.numerics import forked_random

_WAY_OUT = "Use background='drop'"


@torch.no_grad()
def moved_rows(part: fx.GraphModule, images: Tensor, regions: Tensor | None = None) -> Tensor:
    """Which rows of a token stream change with some regions of an image, (regions, N). Parameters on meta are taken to be ones.

    Args:
        part: The graph as far as the stream, over a scratch copy of the model's modules.
        images: Images of the traced shape.
        regions: (regions, ...) bool, True for the pixels that change; an axis may be 1. Default: all pixels, as one region.

    Raises:
        TraceError: The graph does not run.
    """
    own = [*part.named_parameters(remove_duplicate=False), *part.named_buffers(remove_duplicate=False)]
    on_meta = {name: t for name, t in own if t.is_meta}
    values = {name: torch.full(t.shape, t.is_floating_point(), device="cpu", dtype=t.dtype) for name, t in on_meta.items()}
    plain = torch.zeros((1, *images.shape[1:]), dtype=images.dtype, device="cpu" if images.is_meta else images.device)
    if images.is_floating_point():
        changed = torch.full_like(plain, torch.nan)
    else:
        changed = torch.arange(plain.numel(), device=plain.device).remainder(251).to(plain.dtype).view_as(plain)
    if regions is not None:
        changed = torch.where(regions.to(plain.device), changed, plain)
    results: list[Tensor] = []
    try:
        for given in (plain.expand_as(changed), changed):
            with forked_random(plain):  # in training, the same tokens drop out in both
                torch.manual_seed(0)
                results.append(cast(Tensor, functional_call(part, values, (given,))))
    except torch.OutOfMemoryError:  # says nothing about the model
        raise
    except MODEL_ERRORS as error:
        raise TraceError(
            f"the graph as far as the tokens does not run on images {tuple(changed.shape)}: {first_line(error)}"
        ) from error
    before, after = results
    return (before != after).any(-1)  # NaN differs from every number


def check_apart(part: fx.GraphModule, images: Tensor, rows: TokenRows, layout: str) -> None:
    """Refuses an embedding in which patches see each other, or other tokens see them: it cannot embed coarse patches.

    Every second row and column of patches changes, at each of the four offsets (eight for clips): the tokens of these patches
    must change, and no others.

    Args:
        part: The graph as far as the tokens, over a scratch copy of the model's modules.
        images: Images of the traced shape. Patches of one size cover them.
        rows: What the tokens stand for.
        layout: Axes of the images.

    Raises:
        NoSiteError: They do.
    """
    offsets = list(product(*[range(min(2, count)) for count in rows.grid]))
    cells = torch.stack([_every_second(rows.grid, offset) for offset in offsets])  # (offsets, *grid)
    moved = moved_rows(part, images, _pixels(cells, images.shape, rows.grid, layout)).cpu()
    wanted = torch.zeros((len(offsets), rows.count), dtype=torch.bool)
    wanted[:, rows.prefix : rows.prefix + rows.cells] = cells.flatten(1)
    wrong = (moved != wanted).nonzero().tolist()
    if wrong:
        number, token = wrong[0]
        stream = part.graph.output_node().all_input_nodes[0]
        moves = "moves" if moved[number, token] else "does not move"
        raise NoSiteError(
            f"background='coarse': sought an embedding in which every patch of the image moves its own token alone, found that "
            f"changing every second patch from {offsets[number]} on {moves} token {token} of `{stream.name}`"
            f"{_overlapping(part, stream)}. {_WAY_OUT}"
        )


def patch_dropout(graph: fx.Graph, stream: fx.Node, training: fx.Graph) -> str:
    """Why the model cannot be pruned in training: it drops patches itself before the stream; empty if it does not."""
    sizes = {node.name: shape_of(node) for node in training.nodes}
    for node in graph.nodes:
        shape, other = shape_of(node), sizes.get(node.name)
        if shape and other and len(shape) == len(other) == 3 and other[1] < shape[1]:
            return (
                f"`{node.target}` itself drops patches in training, {shape[1]} tokens to {other[1]} (patch dropout): the map "
                "would no longer say which token is which. Set its rate to 0"
            )
        if node is stream:
            break
    return ""


def _every_second(grid: Sequence[int], offset: Sequence[int]) -> Tensor:
    """A mask of the patches that lie an even number of places from `offset` on every axis."""
    mask = torch.zeros(tuple(grid), dtype=torch.bool)
    mask[tuple(slice(first, None, 2) for first in offset)] = True
    return mask


def _pixels(cells: Tensor, shape: Sequence[int], grid: Sequence[int], layout: str) -> Tensor:
    """Masks of patches (K, *grid) as masks of pixels, with the axes of the images."""
    sides = {"B": len(cells), "C": 1}
    for axis, (letter, count) in enumerate(zip("THW"[-len(grid) :], grid, strict=True), start=1):
        sides[letter] = shape[layout.index(letter)]
        cells = cells.repeat_interleave(sides[letter] // count, dim=axis)
    return cells.reshape([sides[letter] for letter in layout])


def _overlapping(part: fx.GraphModule, stream: fx.Node) -> str:
    """Names a convolution before the stream whose windows overlap; empty if there is none."""
    called = [node for node in ancestors(stream) if node.op == "call_module"]
    for node in reversed(called):
        for name, module in part.get_submodule(str(node.target)).named_modules(prefix=str(node.target)):
            convolves = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            if convolves and any(k > s for k, s in zip(module.kernel_size, module.stride, strict=True)):
                sizes = f"{type(module).__name__}, kernel {module.kernel_size}, stride {module.stride}"
                return f": the windows of `{name}` overlap ({sizes}), as in a convolutional stem"
    return ""
