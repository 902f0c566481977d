"""Slices of a token axis: whether they take the same tokens when there are fewer.

Python shortens a slice that reaches beyond the end, so no error and no length tells. `x[:, -16:]` takes all 16 patches of 17
tokens, and of 13 tokens it takes the class token too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, fx

from ..ops.rows import Span
from ..tracing.graphs import called, shape_of
from .token_run import TokenRun, is_size


def other_tokens(run: TokenRun, node: fx.Node) -> str:
    """The slice of a shortened axis by which `node` would take other tokens than of all, as text; empty if there is none.

    Args:
        run: The run on fewer tokens, which has come to `node`.
        node: The node that it runs.
    """
    if called(node) != "getitem" or not isinstance(source := node.args[0], fx.Node):
        return ""
    value, dense = run.env[source], shape_of(source)
    if not isinstance(value, Tensor) or dense is None or len(dense) != value.ndim:
        return ""
    if not all(is_size(run.env[n]) and is_size(n.meta.get("value")) for n in node.all_input_nodes if n is not source):
        return ""  # tensors pick tokens one by one
    before = cast(Any, fx.map_arg(node.args[1], lambda n: n.meta.get("value")))
    after = cast(Any, fx.map_arg(node.args[1], lambda n: run.env[n]))
    for (axis, whole), (_, short) in zip(_slices(before, len(dense)), _slices(after, len(dense)), strict=True):
        lengths = dense[axis], value.shape[axis]
        ends = _ends(run, lengths)
        if ends and not any(_is_same(whole, short, lengths, *end) for end in ends):
            return f"{_text(whole)} of {lengths[0]} tokens"
    return ""


def _ends(run: TokenRun, lengths: tuple[int, int]) -> list[tuple[int, int]]:
    """How many tokens an axis may have in front of its patches and behind them, given its length before and now."""
    rows = run.stream.rows
    ends = [(rows.prefix - span.first, rows.suffix - span.behind) for span, known in run.lengths.items() if known == lengths]
    dense, kept = run.lengths[Span()]
    if not ends and lengths[0] - lengths[1] == dense - kept:  # more tokens were put in: at which end is not known
        others = lengths[0] - rows.cells
        ends = [(others, others)]
    return ends


def _slices(index: object, rank: int) -> Iterator[tuple[int, slice]]:
    """The slices in an index of a tensor with `rank` axes, each with its axis. Of an index with tensors in it, none."""
    parts = cast("tuple[Any, ...]", index if isinstance(index, tuple) else (index,))
    if any(isinstance(part, Tensor | list) for part in parts):
        return
    taken = sum(part is not None and part is not ... for part in parts)
    axis = 0
    for part in parts:
        if isinstance(part, slice):
            yield axis, part
        axis += rank - taken if part is ... else part is not None


def _is_same(whole: slice, short: slice, lengths: tuple[int, int], front: int, behind: int) -> bool:
    """Whether a slice of all tokens, and what it is of fewer, begin and end at the same tokens, and in no midst of patches."""
    dense, kept = lengths
    bounds = whole.indices(dense)[:2], short.indices(kept)[:2]
    if whole.step not in (None, 1):
        return bounds == ((0, dense), (0, kept))  # every other token: the proof sees that others are kept
    return all(
        (place <= front and found == place) or (dense - place <= behind and found == place - dense + kept)
        for place, found in zip(*bounds, strict=True)
    )


def _text(part: slice) -> str:
    """A slice as code writes it."""
    start, stop = ("" if bound is None else str(bound) for bound in (part.start, part.stop))
    return f"[{start}:{stop}]"
