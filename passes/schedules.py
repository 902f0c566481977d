"""How many tokens each block removes: as many in each, as many as a list says, or more in later blocks for the same work.

A token that goes in an early block saves the work of many blocks, but an early block knows least which token can go.
`schedule="late"` lets the number grow with the square of depth: s * i^2 in the i-th of the chosen blocks. s is chosen so that
the multiply-accumulates are those of the same r in each block, as nearly as whole tokens allow. No block removes more than half
of its patches, in any schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

Schedule = Literal["constant", "late"]
SCHEDULES: tuple[Schedule, ...] = ("constant", "late")

_STEPS = 60  # of a bisection: below, a float's precision


class Work(NamedTuple):
    """The multiply-accumulates that follow on one reduction, up to the next, or up to the end.

    Attributes:
        per_token: For each token.
        per_pair: For each pair of tokens: in attention.
    """

    per_token: float
    per_pair: float


class Start(NamedTuple):
    """The tokens before the first reduction.

    Attributes:
        patches: How many patches there are.
        others: How many other tokens there are. They stay.
    """

    patches: int
    others: int


def left_after(amounts: Sequence[int], patches: int) -> list[int]:
    """How many of `patches` are left after each block, which removes half of its patches at most."""
    left: list[int] = []
    for amount in amounts:
        patches -= min(amount, patches // 2)
        left.append(patches)
    return left


def first_excess(amounts: Sequence[int], patches: int) -> tuple[int, int] | None:
    """The first block that should remove more than half of its patches: its place, and how many it has."""
    before = [patches, *left_after(amounts, patches)]
    return next(((i, before[i]) for i, amount in enumerate(amounts) if amount > before[i] // 2), None)


def late_amounts(r: int, start: Start, work: Sequence[Work]) -> tuple[int, ...]:
    """How many patches each block removes, for the same work as `r` in each.

    Args:
        r: Patches that each block would remove with a constant schedule.
        start: The tokens before the first block.
        work: What follows on each reduction.
    """
    goal = _total([r] * len(work), start, work)
    low, high = 0.0, float(start.patches)  # at high, each block removes all it can
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if _total(_squares(middle, start, work), start, work) > goal else (low, middle)
    found = (_squares(scale, start, work) for scale in (low, high))
    return min(found, key=lambda amounts: abs(_total(amounts, start, work) - goal))


def _squares(scale: float, start: Start, work: Sequence[Work]) -> tuple[int, ...]:
    """`scale` times the square of each block's place, from 1, but at most half of the patches that the block has."""
    wanted = [round(scale * place * place) for place in range(1, len(work) + 1)]
    left = [start.patches, *left_after(wanted, start.patches)]
    return tuple(before - after for before, after in pairwise(left))


def _total(amounts: Sequence[int], start: Start, work: Sequence[Work]) -> float:
    """The multiply-accumulates from the first reduction on."""
    counts = [start.others + left for left in left_after(amounts, start.patches)]
    return sum(each.per_token * n + each.per_pair * n * n for each, n in zip(work, counts, strict=True))
