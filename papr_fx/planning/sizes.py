"""Which other image sizes a traced graph takes: those for which it gives the model's output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from ..dataflow.grids import Origin
from ..errors import TraceError
from ..ops import TokenRows
from ..passes.prune_tokens import patch_sizes
from ..tracing.fakes import MODEL_ERRORS
from ..tracing.graphs import propagate, shape_of
from ..tracing.numerics import exact_float32, forked_random, redraw, relative_error

_TOLERANCE = 1e-3


def taken_sizes(
    model: nn.Module, whole: Callable[[], fx.GraphModule], images: Tensor, layout: str, *more: tuple[int, int]
) -> list[tuple[int, ...]]:
    """Shapes of images of other sizes for which a graph gives the model's output; none if it differs for one of them.

    One size has another aspect than the traced one, one has fewer or more pixels. Code may keep a size of the traced images, so
    shapes do not tell: both run on random images, with parameters at unit scale. Only shapes count on meta.

    Args:
        model: A scratch copy of the model, in eval mode.
        whole: Makes its graph, over a scratch copy of its modules.
        images: Images of the traced shape.
        layout: Their axes.
        *more: (H, W) of another aspect to try first, larger on both sides.
    """
    groups = _other_sizes(images, layout, more)
    if images.is_meta:
        return [shape for group in groups for shape in group[:1] if _shapes_at(whole(), images, shape) is not None]
    random = torch.Generator(images.device).manual_seed(0)
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    values: dict[str, Tensor] = {}
    taken: list[tuple[int, ...]] = []
    graph = cache(lambda: _Quiet(whole()))
    for group in groups:
        for shape in group:
            some = torch.randn(shape, generator=random, device=images.device, dtype=dtype)
            if not values and _output(model, {}, some) is not None:  # most models take one size, and refuse at once
                values = redraw(model, random, dtype)
            expected = _output(model, values, some) if values else None
            if expected is None:
                continue
            found = _output(graph(), values, some)
            if found is None or not relative_error(found, expected) < _TOLERANCE:
                return []
            taken.append(shape)
            break
    return taken


def takes_others(model: nn.Module, images: Tensor, layout: str) -> bool:
    """Whether a model, a scratch copy in eval mode, runs on images of any other size, as far as can be seen."""
    shapes = [shape for group in _other_sizes(images, layout, ()) for shape in group]
    return images.is_meta or any(_output(model, {}, images.new_zeros(shape)) is not None for shape in shapes)


def counts_follow(
    part: fx.GraphModule, images: Tensor, shapes: Iterable[tuple[int, ...]], rows: TokenRows, layout: str
) -> bool:
    """Whether a token stream has as many tokens as patches of the traced size lie in images of other shapes.

    Args:
        part: The graph as far as the stream, over a scratch copy of the model's modules.
        images: Images of the traced shape.
        shapes: The other shapes.
        rows: The grid of the stream's tokens on `images`, and the tokens before and behind it.
        layout: Axes of the images.
    """
    patch = patch_sizes(images.shape, rows, layout)
    if patch is None:
        return False
    stream = part.graph.output_node().all_input_nodes[0].name
    axes = [layout.index(letter) for letter in "THW" if letter in layout]
    for shape in shapes:
        grid = tuple(shape[axis] // size for axis, size in zip(axes, patch, strict=True))
        if (_shapes_at(part, images, shape) or {}).get(stream, ())[1:2] != (TokenRows(grid, rows.prefix, rows.suffix).count,):
            return False
    return True


def grids_follow(
    whole: fx.GraphModule,
    images: Tensor,
    shapes: Iterable[tuple[int, ...]],
    layout: str,
    grids: Sequence[tuple[TokenRows, Origin]],
) -> bool:
    """Whether a model's grids grow with its images.

    They do not where a grid holds padding, or where two grids are equal at the traced size by chance.

    Args:
        whole: The graph, over a scratch copy of its modules.
        images: Images of the traced shape.
        shapes: Other shapes that the graph takes.
        layout: Axes of the images.
        grids: The grids on `images`, and where their sizes can be read.
    """
    axes = [layout.index(letter) for letter in "THW" if letter in layout]
    for shape in shapes:
        found = _shapes_at(whole, images, shape)
        if found is None or not _follow(found, [shape[axis] / images.shape[axis] for axis in axes], grids):
            return False
    return True


def _other_sizes(images: Tensor, layout: str, more: Sequence[tuple[int, int]]) -> list[list[tuple[int, ...]]]:
    """Shapes of one image or clip of other sizes, in groups: another aspect, other pixels, longer. The first taken counts.

    Over the groups each side is once longer and once shorter than the traced one. Of another aspect some have as many pixels,
    for models whose number of patches is fixed.
    """
    height, width = images.shape[-2:]
    aspect = [*more, (2 * height, width // 2), (height // 2, 2 * width)]
    other = [(height // 2, width // 2), (2 * height, 2 * width), (2 * height, width)]
    if not more:
        other.insert(0, (height // 2, width + width // 2))
    groups: list[list[tuple[int, ...]]] = [[(1, *images.shape[1:-2], *size) for size in sizes] for sizes in (aspect, other)]
    if "T" in layout:
        shape = [1, *images.shape[1:]]
        shape[layout.index("T")] *= 2
        groups.append([tuple(shape)])
    return groups


class _Quiet(nn.Module):
    """Runs a graph module. By itself that writes to stderr where it fails, which is a normal result here."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, images: Tensor) -> Any:
        return type(self.graph).forward(self.graph, images)


@torch.no_grad()
def _output(module: nn.Module, values: dict[str, Tensor], images: Tensor) -> Any:
    """What a module with these parameters makes of images; None if it refuses them."""
    own = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    names = {name: name.removeprefix("graph.") if isinstance(module, _Quiet) else name for name, _ in own}
    given = {name: values.get(names[name], t.to(images.dtype) if t.is_floating_point() else t) for name, t in own}
    try:
        with forked_random(images), exact_float32():
            return functional_call(module, given, (images,))
    except torch.OutOfMemoryError:  # says nothing about the model
        raise
    except MODEL_ERRORS:
        return None


def _shapes_at(part: fx.GraphModule, images: Tensor, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]] | None:
    """Shapes of all values, by node name, when the part runs on images of that shape; None if it does not run."""
    try:
        propagate(part, part.graph, images.new_empty(shape))
    except TraceError:
        return None
    return {node.name: shape_of(node) or () for node in part.graph.nodes}


def _follow(shapes: dict[str, tuple[int, ...]], scale: Sequence[float], grids: Iterable[tuple[TokenRows, Origin]]) -> bool:
    """Whether grids are scaled by those factors, and equal grids stay equal."""
    found: dict[tuple[int, ...], set[tuple[int, ...]]] = defaultdict(set)
    for rows, origin in grids:
        if max(origin.axes) >= len(shapes[origin.node]):  # a module flattens them inside
            return False
        found[rows.grid].add(tuple(shapes[origin.node][axis] for axis in origin.axes))
    if any(len(sizes) > 1 for sizes in found.values()):
        return False
    return all(
        abs(count - before * by) < 1
        for grid, (counts,) in found.items()
        for count, before, by in zip(counts, grid, scale, strict=True)
    )
