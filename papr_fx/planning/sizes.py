"""Whether a model takes images of other sizes than the traced one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx

from ..dataflow.grids import Origin
from ..errors import TraceError
from ..ops import TokenRows
from ..tracing.fakes import MODEL_ERRORS
from ..tracing.graphs import propagate, shape_of


def takes_other_sizes(part: fx.GraphModule, images: Tensor, layout: str) -> bool:
    """Whether a part of a model runs on images of at least one other size.

    Shapes say most, but not whether an index is in range. So a size that they allow is run, unless the model has no weights.

    Args:
        part: The part, over a scratch copy of the model's modules.
        images: Images of the traced shape.
        layout: Their axes.
    """
    allowed = (shape for shape in other_sizes(images, layout) if _shapes_at(part, images, shape) is not None)
    return any(images.is_meta or _runs(part, images.new_zeros(shape)) for shape in allowed)


def grids_follow(whole: fx.GraphModule, images: Tensor, layout: str, grids: Sequence[tuple[TokenRows, Origin]]) -> bool:
    """Whether a model runs on images of other sizes, and its grids grow with them.

    They do not where a grid holds padding, or where two grids are equal at the traced size by chance.

    Args:
        whole: The model, over a scratch copy of its modules.
        images: Images of the traced shape.
        layout: Their axes.
        grids: Its grids on these images, and where their sizes can be read.
    """
    height, width = images.shape[-2:]
    rows, columns = (side // count for side, count in zip((height, width), grids[0][0].grid[-2:], strict=True))  # per position
    axes = [layout.index(letter) for letter in "THW" if letter in layout]
    taken = 0
    for shape in other_sizes(images, layout, (height + rows, width + 3 * columns)):
        shapes = _shapes_at(whole, images, shape)
        scale = [shape[axis] / images.shape[axis] for axis in axes]
        if shapes is not None and not _follow(shapes, scale, grids):
            return False
        taken += shapes is not None
    return taken > 0


def other_sizes(images: Tensor, layout: str, *more: tuple[int, int]) -> list[tuple[int, ...]]:
    """Shapes of one image or clip of other sizes: twice as large, of other aspects, (H, W) of `more`, twice as long."""
    height, width = images.shape[-2:]
    sizes = [(2 * height, 2 * width), (2 * height, width // 2), (height // 2, 2 * width), *more]
    shapes: list[tuple[int, ...]] = [(1, *images.shape[1:-2], *size) for size in sizes]
    if "T" in layout:
        shape = [1, *images.shape[1:]]
        shape[layout.index("T")] *= 2
        shapes.append(tuple(shape))
    return shapes


@torch.no_grad()
def _runs(part: fx.GraphModule, images: Tensor) -> bool:
    try:
        part(images)
    except torch.OutOfMemoryError:  # says nothing about the model
        raise
    except MODEL_ERRORS:
        return False
    return True


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
