"""Finds out which tokens follow which patches of an image: by changing patches."""

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
from ..tracing.numerics import exact_float32, forked_random, redraw

_WAY_OUT = "Use background='drop'"
_ROUNDING = 1e-5  # relative; rounding errors of one row may follow what another holds


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
    moved = _moved_rows(part, images, _pixels(cells, images.shape, rows.grid, layout))
    wanted = torch.zeros((len(offsets), rows.count), dtype=torch.bool, device="cpu")
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


@torch.no_grad()
def _moved_rows(part: fx.GraphModule, images: Tensor, regions: Tensor) -> Tensor:
    """Which rows of the tokens change with regions of a random image, (regions, N), with parameters at unit scale.

    Raises:
        TraceError: The graph does not run.
    """
    random = torch.Generator("cpu" if images.is_meta else images.device).manual_seed(0)
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    values, shape = redraw(part, random, dtype), (1, *images.shape[1:])
    if images.is_floating_point():
        plain, other = torch.randn((2, *shape), generator=random, device=random.device, dtype=dtype)
    else:
        plain, other = torch.randint(256, (2, *shape), generator=random, device=random.device).to(images.dtype)
    changed = torch.where(regions.to(random.device), other, plain)
    results: list[Tensor] = []
    try:
        for given in (plain.expand_as(changed), changed):
            with forked_random(plain), exact_float32():
                torch.manual_seed(0)  # in training, the same elements drop out of both
                results.append(cast(Tensor, functional_call(part, values, (given,))))
    except torch.OutOfMemoryError:  # says nothing about the model
        raise
    except MODEL_ERRORS as error:
        raise TraceError(
            f"background='coarse': the graph as far as the tokens does not run on images {tuple(changed.shape)} in {dtype}: "
            f"{first_line(error)}"
        ) from error
    change = (results[1] - results[0]).abs().amax(-1)
    return (change > _ROUNDING * change.max()).cpu()


def patch_dropout(graph: fx.Graph, stream: fx.Node, training: fx.Graph) -> str:
    """Why the model cannot be pruned in training: it drops patches itself before the stream; empty if it does not."""
    sizes = {node.name: shape_of(node) for node in training.nodes}
    for node in graph.nodes:
        shape, other = shape_of(node), sizes.get(node.name)
        if shape and other and len(shape) == len(other) == 3 and other[1] < shape[1]:
            drops = next(there for there in training.nodes if shape_of(there) == other)
            name = next(reversed(drops.meta.get("inside", ())), "") or node.target
            return (
                f"`{name}` itself drops patches in training, {shape[1]} tokens to {other[1]} (patch dropout): the map "
                "would no longer say which token is which. Set its rate to 0"
            )
        if node is stream:
            break
    return ""


def _every_second(grid: Sequence[int], offset: Sequence[int]) -> Tensor:
    """A mask of the patches that lie an even number of places from `offset` on every axis."""
    mask = torch.zeros(tuple(grid), dtype=torch.bool, device="cpu")
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
