"""Part 14, choice: the module keeps the positions that its map says, and returns what follows from these."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..errors import VerifyError
from ..ops import TokenRows
from ..passes.kinds import Kind
from ..planning.modes import Choice
from ..planning.plan import keep_of
from ..proposals.network import SignificanceNet
from ..proposals.saliency import Chance, Mean
from ..tracing.graphs import cut
from ..tracing.numerics import relative_error, tensors_of
from ..tracing.roles import find
from ..tracing.sources import GraphModule
from .case import Case, ComparisonError
from .coarse import patches_of_cells

Grid = tuple[int, ...]


def check(case: Case) -> None:
    """Runs the module's own graph on two images: its map, what it keeps of each grid, and what it returns.

    The map of an image is what it is of the image alone, normalised and resized for the proposal; where it is a mean of
    features, it is that mean (PaPr, Eq. 2). It is resized as the paper says (Sec. 3.2). What is kept is looked at in Python: as
    many positions as Eq. 3 says, once each and in order, none of them less significant than one that is dropped, and all other
    tokens. The output is that of the graph of the other parts, given these positions.

    Fault: a choice that keeps the wrong positions, or the wrong number of them. The other parts do not find it: they give
    positions to the graph.
    Example: one position too many: the module keeps 9 of 16 patches where z=0.5 leaves 8.

    Raises:
        VerifyError: Another map, other positions, or another output.
    """
    compare(case, case.images, {choice.rows.grid: choice.rows.grid for choice in case.rewrite.choices})


def compare(case: Case, images: Tensor, grids: Mapping[Grid, Grid]) -> None:
    """The same for these images, which may have another size than the traced ones.

    Args:
        case: The case.
        images: They.
        grids: What grids of the traced images are for these; a number of positions where the grid is not known.
    """
    graph, choices = case.own_graph, case.rewrite.choices
    nodes = [find(graph, Kind.MAP)]
    nodes += [node for choice in choices for node in (find(graph, Kind.PSM, choice.number), keep_of(graph, choice))]
    part = cut(case.root, graph, *nodes)
    maps, *found = tensors_of(case.run(part, images))
    _check_maps(case, maps, images, part)
    kept: list[Tensor] = []
    for choice, psm, keep in zip(choices, found[::2], found[1::2], strict=True):
        _check_map(case, maps, psm)
        rows = TokenRows(tuple(psm.shape[1:]), choice.rows.prefix, choice.rows.suffix)
        wanted = grids[choice.rows.grid]
        if (rows.grid if len(wanted) > 1 else (rows.cells,)) != wanted:
            raise VerifyError(f"choice: {choice.where}, the map has grid {rows.grid}, the positions {wanted}")
        for scores, index in zip(psm.flatten(1).tolist(), keep.tolist(), strict=True):
            _check_kept(choice, rows, scores, index, case.own_z)
        kept.append(keep)
    reduces = case.rewrite.mode.reduces
    whole = GraphModule(case.root, case.rewrite.graph_on(narrow=False, fuse=False)) if reduces else case.pruned
    expected = case.run(whole, images[:1], *(keep[:1] for keep in kept))
    error = relative_error(case.run(GraphModule(case.root, graph), images[:1]), expected)
    if not error <= case.tolerance:
        raise ComparisonError(
            f"choice: what the module returns is off by {error:.1e} (relative; {case.tolerance:.0e} is allowed) from what "
            "follows from the positions that it keeps"
        )


def _check_maps(case: Case, maps: Tensor, images: Tensor, part: fx.GraphModule) -> None:
    """Raises unless maps are those of each image by itself, and of images that are prepared as the proposal is to see them."""
    network = cast(SignificanceNet, case.root.papr_proposal)
    if type(network) is SignificanceNet and not isinstance(network.saliency, Chance):
        expected = case.run(_PlainMap(network, case.rewrite.image_layout), images)
    else:  # by chance an image that differs by rounding has other scores, and motion is of the images as they are
        expected = torch.cat([tensors_of(case.run(part, image))[0] for image in images.split(1)])
    error = relative_error(maps, expected)
    if not error <= case.tolerance:
        raise ComparisonError(
            f"choice: the map is off by {error:.1e} (relative; {case.tolerance:.0e} is allowed) from "
            "that of each image by itself, normalised and resized for the proposal"
        )


class _PlainMap(nn.Module):
    """Maps of each image by itself, normalised and resized for the proposal: in PaPr, Eq. 2, the mean over channels."""

    def __init__(self, network: SignificanceNet, layout: str) -> None:
        super().__init__()
        self.papr_proposal = network  # by this name the case knows its tensors
        self.channels = layout.index("C") - 1

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([self._map(image) for image in images])

    def _map(self, image: Tensor) -> Tensor:
        network = self.papr_proposal
        last = image.movedim(self.channels, -1).to(torch.promote_types(image.dtype, torch.float32))
        if network.scale is not None and network.shift is not None:
            last = last * network.scale.flatten() + network.shift.flatten()
        image = last.movedim(-1, 0).unsqueeze(0)  # (1, C, H, W) or (1, C, T, H, W)
        if network.size is not None:
            mode = "trilinear" if image.ndim == 5 else "bilinear"
            image = F.interpolate(image, _resized(list(image.shape[2:]), network.size), mode=mode, align_corners=False)
        maps = [self._of_features(one) for one in (image.unbind(2) if network.per_frame else [image])]
        return torch.stack(maps) if network.per_frame else maps[0]

    def _of_features(self, image: Tensor) -> Tensor:
        trunk, saliency = self.papr_proposal.trunk, self.papr_proposal.saliency
        features = cast(Tensor, trunk(image))
        maps = features.mean(saliency.axis) if isinstance(saliency, Mean) else cast(Tensor, saliency(features, image, trunk))
        return maps[0]


def _resized(sides: list[int], size: int | tuple[int, ...]) -> list[int]:
    """The sizes of an image whose shorter side becomes `size`, or whose last sides do."""
    if isinstance(size, tuple):
        return [*sides[: len(sides) - len(size)], *size]
    factor = Fraction(size, min(sides[-2:]))
    return [*sides[:-2], *(round(side * factor) for side in sides[-2:])]


def _check_map(case: Case, maps: Tensor, psm: Tensor) -> None:
    """Raises unless `psm` (B, *grid) is the map (B, h, w), or (B, t, h, w), resized to its grid."""
    grid, given = tuple(psm.shape[1:]), maps.unsqueeze(1)
    if case.rewrite.plan.target.fine:
        expected = F.adaptive_avg_pool3d(given, cast("tuple[int, int, int]", grid))
    else:
        mode = "trilinear" if len(grid) == 3 else "bicubic"
        expected = F.interpolate(given, grid, mode=mode, align_corners=True)
    error = relative_error(psm, expected.squeeze(1))
    if not error <= case.tolerance:
        raise ComparisonError(f"choice: on grid {grid} the map is off by {error:.1e} from that of the proposal, resized to it")


def _check_kept(choice: Choice, rows: TokenRows, scores: list[float], index: list[int], z: float) -> None:
    """Raises unless `index` holds the rows that these scores of the grid's positions leave of one image."""
    total, end = rows.cells + rows.others, len(index) - rows.suffix
    count = min(rows.cells, max(1, int(Decimal(repr(z)) * total)))
    ends = [*range(rows.prefix)], [*range(total - rows.suffix, total)]
    kept = [row - rows.prefix for row in index[rows.prefix : end]]
    agrees = _are_best_quads if choice.coarse else _are_best
    if (index[: rows.prefix], index[end:]) != ends or not agrees(rows, scores, kept, count):
        raise VerifyError(
            f"choice: at z={z:g}, {choice.where}, the module keeps rows {_shortened(index)} of {total} ({rows.prefix} before "
            f"the grid {rows.grid} and {rows.suffix} behind it), which are not those of the {count} most significant positions"
        )


def _are_best(rows: TokenRows, scores: list[float], kept: list[int], count: int) -> bool:
    """Whether these are `count` positions in order, none of them less significant than another one."""
    if len(kept) != count or not _ascend(kept, rows.cells):
        return False
    return _least(scores, kept) >= _most(scores, {*range(rows.cells)} - {*kept})


def _are_best_quads(rows: TokenRows, scores: list[float], kept: list[int], count: int) -> bool:
    """Whether these are the patches of the best quads of four, in order, and behind them the other quads, as far as they go.

    Each quad is a token; three more make one of four fine.
    """
    quads, behind = patches_of_cells(rows.grid), rows.cells + rows.suffix
    means = [sum(scores[patch] for patch in quad) / len(quad) for quad in quads]
    whole = {number for number, quad in enumerate(quads) if len(quad) == 4}
    fine_count = max(0, min(len(whole), (count - len(quads)) // 3))
    patches, coarse = [row for row in kept if row < behind], [row - behind for row in kept if row >= behind]
    fine = {number for number in whole if {*quads[number]} <= {*patches}}
    counts = len(fine), len(patches), len(coarse)
    if counts != (fine_count, 4 * fine_count, min(count, len(quads)) - fine_count) or fine & {*coarse}:
        return False
    if kept != patches + [row + behind for row in coarse]:
        return False
    if not _ascend(patches, rows.cells) or not _ascend(coarse, len(quads)):
        return False
    rounding = 1e-6 * max(map(abs, scores))  # the order in which a mean is summed
    dropped = {*range(len(quads))} - fine - {*coarse}
    return (
        _least(means, fine) >= _most(means, whole - fine) - rounding
        and _least(means, coarse) >= _most(means, dropped) - rounding
    )


def _ascend(numbers: Sequence[int], end: int) -> bool:
    return all(0 <= number < end for number in numbers) and all(one < other for one, other in pairwise(numbers))


def _least(scores: Sequence[float], of: Iterable[int]) -> float:
    return min((scores[number] for number in of), default=math.inf)


def _most(scores: Sequence[float], of: Iterable[int]) -> float:
    return max((scores[number] for number in of), default=-math.inf)


def _shortened(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:12]))
    return f"{shown}, ... ({len(numbers)})" if len(numbers) > 12 else shown
