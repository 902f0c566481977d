"""Part 4, geometry: the map scores the position that its patch of the image becomes."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ..dataflow.moves import residual_of
from ..errors import SiteError, VerifyError
from ..ops import TokenRows
from ..tracing.graphs import cut, nodes_by_name
from ..tracing.numerics import tensors_of
from .case import Case
from .rewrite import Stream


def check(case: Case) -> None:
    """Changes single patches of an image: the positions that the map scores there must move most, and no other token.

    Fault: positions are not in row-major order of the grid, or a class token is computed from the image. The other parts
    do not find it: they choose positions at random, and any order of the grid is as good as another.
    Example: a toy ViT that flattens its grid column by column: changing patch (0, 3) moves token 13 most, where the map
    scores token 4. Every other error is below 4e-16.

    Raises:
        VerifyError: Other positions move. For pixel operators a `SiteError` whose `additions` rely on the wrong order.
    """
    graph = case.rewrite.dense_graph()
    if case.rewrite.prunes_tokens:
        ((rows, cells),) = case.probes
        for stream, moved in _movements(case, graph, rows, cells).items():
            _check_tokens(stream, moved, cells)
        return
    # A branch spreads a change over the grid. Without the branches, it stays in its place.
    for node in graph.nodes:
        residual = residual_of(node)
        if residual:
            node.op, node.target, node.args = "call_function", operator.pos, (residual,)
    moved = [(movement, cells) for rows, cells in case.probes for movement in _movements(case, graph, rows, cells).items()]
    wrong = [stream for (stream, movement), cells in moved if not _in_order(stream, movement, cells)]
    if wrong:
        where = ", ".join(f"`{stream.node}` on grid {stream.rows.grid}" for stream in wrong)
        raise SiteError(
            f"geometry: changing patches of the image moves other positions more than these in {where}: positions are not in "
            "row-major order of the grid there",
            tuple(name for stream in wrong for name in case.rewrite.streams[stream]),
        )


def _movements(case: Case, graph: fx.Graph, rows: TokenRows, cells: Sequence[int]) -> dict[Stream, Tensor]:
    """How far each position of the streams on a grid moves when one patch of the image is changed, (cells, positions)."""
    image, grid = case.images[:1], rows.grid
    probes = image.repeat(len(cells) + 1, *[1] * (image.ndim - 1))  # the first stays as it is
    for probe, cell in enumerate(cells, start=1):
        patch = probes[probe : probe + 1]
        for letter, place, count in zip("THW"[-len(grid) :], _place(cell, grid), grid, strict=True):
            axis = case.rewrite.image_layout.index(letter)
            first, end = (image.shape[axis] * edge // count for edge in (place, place + 1))
            patch = patch.narrow(axis, first, end - first)
        patch *= -1
    streams, nodes = [stream for stream in case.rewrite.streams if stream.rows == rows], nodes_by_name(graph)
    values = case.run(cut(case.root, graph, *(nodes[stream.node] for stream in streams)), probes)
    return {stream: _moved(stream, value) for stream, value in zip(streams, tensors_of(values), strict=True)}


def _moved(stream: Stream, value: Tensor) -> Tensor:
    """How far each position of a batch is from that of its first image, (B - 1, N)."""
    positions = value.movedim(stream.layout.index("C"), -1).flatten(1, -2)  # (B, N, C)
    return (positions[1:] - positions[:1]).abs().sum(-1)


def _check_tokens(stream: Stream, moved: Tensor, cells: Sequence[int]) -> None:
    """Raises unless each changed patch moves its own token most, and none in front of the grid or behind it."""
    rows = stream.rows
    ends = (("first", rows.prefix, moved[:, : rows.prefix]), ("last", rows.suffix, moved[:, rows.prefix + rows.cells :]))
    for word, count, others in ends:
        if count and bool((others != 0).any()):
            raise VerifyError(
                f"geometry: the {word} {count} of `{stream.node}` were taken for tokens beside the patches, such as a class "
                "token, but a patch moves them"
            )
    for cell, token in zip(cells, moved.argmax(1).tolist(), strict=True):
        if token != stream.rows.prefix + cell:
            raise VerifyError(
                f"geometry: changing patch {_place(cell, stream.rows.grid)} of {stream.rows.grid} moves token {token} of "
                f"`{stream.node}` most, not token {stream.rows.prefix + cell}: tokens are not in row-major order of this grid"
            )


def _in_order(stream: Stream, moved: Tensor, cells: Sequence[int]) -> bool:
    """Whether each changed patch moves its own position more than nearly all others: a stem may overlap its patches."""
    moved = moved[:, stream.rows.prefix : stream.rows.prefix + stream.rows.cells]
    own = moved.gather(1, torch.tensor(cells, device=moved.device).unsqueeze(1))
    lesser = (moved < own).sum(1) / max(1, moved.shape[1] - 1)  # 1: the changed patch moves most
    return moved.shape[1] == 1 or bool(lesser.mean() > 0.9)


def _place(cell: int, grid: Sequence[int]) -> tuple[int, ...]:
    """Row and column of a cell that is counted in row-major order."""
    return tuple(int(place) for place in torch.unravel_index(torch.tensor(cell, device="cpu"), grid))
