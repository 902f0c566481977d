"""Part 9, coarse background: a coarse token is what four equal tokens of its patches would be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..ops import TokenRows, choose_quads
from ..planning.modes import TokenPlan
from ..tracing.blocks import last_tokens
from ..tracing.graphs import cut, nodes_by_name
from ..tracing.numerics import relative_error, tensors_of
from .case import Case, ComparisonError
from .hidden_keys import HiddenKeys

COARSE_SHARE = 0.6  # of tokens: some cells are fine, some are coarse


def check(case: Case) -> None:
    """Compares tokens after the last block with the dense graph on cells of equal tokens, of which attention sees one.

    In the dense graph, all patches of a coarse cell hold the cell's token: the mean of what the model embeds where each patch
    of the image is the cell at half size. Tables of positions are averaged over the cell. With one cell taken for another,
    results must differ.

    Fault: the embedding's second run reads something of the first, or a table is averaged over other positions. The other parts
    do not find it: they keep single patches.
    Example: rotary angles of a cell's first patch in place of the mean: the tokens are off by 0.2.
    Does nothing without a coarse background.

    Raises:
        ComparisonError: The tokens differ, or do not depend on the cells.
    """
    if not case.rewrite.coarse:
        return
    rows = case.rewrite.choices[0].rows
    device = case.images.device
    scores = torch.rand((len(case.images), *rows.grid), generator=case.random, device=device)
    keep = choose_quads(scores, COARSE_SHARE, rows.prefix, rows.suffix)
    found, allowed = error(case, keep, keep), tolerance(case)
    if not found <= allowed:
        raise ComparisonError(
            f"coarse background: tokens are off by {found:.1e} (relative; {allowed:.0e} is allowed) from those of the dense "
            "model in which the patches of each coarse cell are equal: something reads the image or a position elsewhere. Pass "
            "background='drop'"
        )
    control = error(case, keep, with_wrong_cell(keep, rows))
    if not control > max(allowed / 10, 10 * found):
        raise ComparisonError(
            f"coarse background: with one cell taken for another, tokens move by only {control:.1e}, so the proof would not "
            "see a fault. Pass verify=False if the model is right to ignore single tokens"
        )


def tolerance(case: Case) -> float:
    """The relative error that rounding may cause: that of the case, or of the means of tables in a narrower dtype."""
    graph, mode = case.dense.graph, case.rewrite.mode
    assert isinstance(mode, TokenPlan)
    tables = [nodes_by_name(graph)[table.value] for table in mode.repairs.tables]
    values = tensors_of(case.run(cut(case.root, graph, *tables), case.images)) if tables else []
    return max([case.tolerance, *(100 * torch.finfo(value.dtype).eps for value in values)])


def error(case: Case, keep: Tensor, given: Tensor) -> float:
    """The relative error of the tokens after the last block, where the rewritten graph keeps the rows `given`, (B, K).

    Args:
        case: The case of a token model with a coarse background.
        keep: The rows that the dense graph stands for, (B, K).
        given: The same, or others as a negative control.
    """
    graph, mode = case.rewrite.dense_graph(), case.rewrite.mode
    assert isinstance(mode, TokenPlan)
    nodes, cells = nodes_by_name(graph), _Cells.of(case, keep)
    stream = nodes[case.rewrite.choices[0].stream]
    last = last_tokens(graph, stream, case.rewrite.blocks)
    tokens = _equal_tokens(case, cut(case.root, graph, stream), cells)
    with graph.inserting_after(graph.find_nodes(op="placeholder")[0]):
        means = graph.placeholder("cell_means")
        equal = graph.placeholder("cell_tokens")
    for table in mode.repairs.tables:
        for user, value in table.users:
            with graph.inserting_before(nodes[user]):
                axes, rank, span = table.pick
                arguments = (nodes[value], means, list(axes), rank, tuple(span))
                averaged = graph.call_function(_average, arguments)
            nodes[user].replace_input_with(nodes[value], averaged)
    stream.replace_all_uses_with(equal)
    with HiddenKeys(cells.hidden):
        dense = cast(Tensor, case.run(cut(case.root, graph, last), case.images, *_in_order(graph, cells.means, tokens)))
    pruned = case.pruned.graph
    found = case.run(cut(case.root, pruned, nodes_by_name(pruned)[last.name]), case.images, given)
    return relative_error(found, dense.gather(1, cells.seen.unsqueeze(-1).expand(-1, -1, dense.shape[-1])))


def with_wrong_cell(keep: Tensor, rows: TokenRows) -> Tensor:
    """Kept rows in which the last cell is another one, or the first patch if there is no other.

    Not a token in front of the patches: tables of patches have no entry for it.
    """
    wrong = keep.clone()
    for sample in wrong:
        cells = (sample >= rows.count).nonzero().flatten().tolist()
        sample[cells[-1] if cells else -1] = sample[cells[0]] if len(cells) > 1 else rows.prefix
    return wrong


class _Cells(NamedTuple):
    """What the rows of a dense token axis (B, N) are in a choice.

    Attributes:
        coarse: Which are in a coarse cell, (B, N).
        means: The matrix (B, N, N) that averages coarse cells, and leaves other rows as they are.
        hidden: Which attention does not see, (B, N): dropped rows, and all of a cell but the first.
        seen: The row of each kept token, (B, K): of a cell, the first.
    """

    coarse: Tensor
    means: Tensor
    hidden: Tensor
    seen: Tensor

    @classmethod
    def of(cls, case: Case, keep: Tensor) -> _Cells:
        """The cells of kept rows."""
        rows = case.rewrite.choices[0].rows
        members = [[rows.prefix + patch for patch in cell] for cell in patches_of_cells(rows.grid)]
        means = torch.eye(rows.count, device=keep.device, dtype=case.images.dtype).repeat(len(keep), 1, 1)
        coarse = torch.zeros((len(keep), rows.count), dtype=torch.bool, device=keep.device)
        seen = keep.clone()
        for sample, kept in enumerate(keep.tolist()):
            for place, row in enumerate(kept):
                if row < rows.count:
                    continue
                cell = members[row - rows.count]
                coarse[sample, cell] = True
                for patch in cell:
                    means[sample, patch] = 0
                    means[sample, patch, cell] = 1 / len(cell)
                seen[sample, place] = cell[0]
        hidden = torch.ones_like(coarse).scatter(1, seen, False)
        return cls(coarse, means, hidden, seen)


def patches_of_cells(grid: Sequence[int]) -> list[list[int]]:
    """The patches of each cell of 2 x 2, in order."""
    *frames, rows, columns = grid
    cells: dict[tuple[int, ...], list[int]] = {}
    for number, (*frame, row, column) in enumerate(product(*map(range, (*frames, rows, columns)))):
        cells.setdefault((*frame, row // 2, column // 2), []).append(number)
    return [cells[place] for place in sorted(cells)]


def _equal_tokens(case: Case, embedding: fx.GraphModule, cells: _Cells) -> Tensor:
    """The stream, in which all patches of a coarse cell hold the cell's token."""
    plain = cast(Tensor, case.run(embedding, case.images))
    halved = cast(Tensor, case.run(embedding, _halved(case.images, case.rewrite.choices[0].rows.grid)))
    return torch.where(cells.coarse.unsqueeze(-1), cells.means @ halved, plain)


def _halved(images: Tensor, grid: Sequence[int]) -> Tensor:
    """Images in which each patch holds its cell at half size."""
    rows, columns = grid[-2:]
    height, width = images.shape[-2] // rows, images.shape[-1] // columns
    flat, out = images.flatten(0, -4), torch.empty_like(images.flatten(0, -4))
    for row, column in product(range(0, rows, 2), range(0, columns, 2)):
        place = (..., slice(row * height, (row + 2) * height), slice(column * width, (column + 2) * width))
        cell = flat[place]
        small = F.adaptive_avg_pool2d(cell, (height, width))
        out[place] = small.repeat(1, 1, cell.shape[-2] // height, cell.shape[-1] // width)
    return out.view_as(images)


def _average(value: Tensor, means: Tensor, axes: Sequence[int], rank: int, span: Sequence[int]) -> Tensor:
    """A table with `rank` axes, averaged over coarse cells along `axes`, which count the rows `span` of all."""
    first, behind = span
    dtype = value.dtype
    matrix = means[:, first : means.shape[1] - behind, first : means.shape[2] - behind].mT
    matrix = matrix.to(torch.promote_types(dtype, matrix.dtype))
    value = value.reshape((1,) * (rank - value.ndim) + tuple(value.shape))
    for axis in axes:
        last = value.movedim(axis, -1)
        mixed = last.flatten(1, -2) if last.ndim > 2 else last.unsqueeze(1)
        mixed = mixed.to(matrix.dtype) @ matrix
        value = mixed.reshape(len(matrix), *last.shape[1:]).movedim(-1, axis)
    return value.to(dtype)


def _in_order(graph: fx.Graph, means: Tensor, tokens: Tensor) -> list[Tensor]:
    """The further inputs of a graph, in its order."""
    given = {"cell_means": means, "cell_tokens": tokens}
    return [given[str(node.target)] for node in graph.find_nodes(op="placeholder")[1:]]
