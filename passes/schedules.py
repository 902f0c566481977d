"""How many tokens each block removes: as many in each, as many as a list says, or as a schedule spreads them.

A token that goes in an early block saves the work of many blocks, but an early block knows least which token can go.

    constant  r in each block
    late      s * i^2 in the i-th of the blocks: few early, many late
    share     s * n of the n patches that a block has: many early, few late, so that some are left behind the last block

s is chosen so that the multiply-accumulates are those of the same r in each block, as nearly as whole tokens allow. No block
removes more than half of its patches, in any schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

Schedule = Literal["constant", "late", "share"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)

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


def spread_amounts(schedule: Schedule, r: int, start: Start, work: Sequence[Work]) -> tuple[int, ...]:
    """How many patches each block removes, for the same work as `r` in each.

    Args:
        schedule: How they are spread.
        r: Patches that each block would remove with a constant schedule.
        start: The tokens before the first block.
        work: What follows on each reduction.
    """
    constant = (r,) * len(work)
    if schedule == "constant":
        return constant
    goal = _total(constant, start, work)
    low, high = 0.0, float(start.patches)  # at high, each block removes all it can
    for _ in range(_STEPS):
        middle = (low + high) / 2
        more = _total(_scaled(schedule, middle, start, work), start, work) > goal
        low, high = (middle, high) if more else (low, middle)
    found = (_scaled(schedule, scale, start, work) for scale in (low, high))
    return min(found, key=lambda amounts: abs(_total(amounts, start, work) - goal))


def _scaled(schedule: Schedule, scale: float, start: Start, work: Sequence[Work]) -> tuple[int, ...]:
    """What each block removes: `scale` times the square of its place, from 1, or times its patches; half of them at most."""
    left, amounts = start.patches, list[int]()
    for place in range(1, len(work) + 1):
        wanted = round(scale * (place * place if schedule == "late" else left))
        amounts.append(min(wanted, left // 2))
        left -= amounts[-1]
    return tuple(amounts)


def _total(amounts: Sequence[int], start: Start, work: Sequence[Work]) -> float:
    """The multiply-accumulates from the first reduction on."""
    counts = [start.others + left for left in left_after(amounts, start.patches)]
    return sum(each.per_token * n + each.per_pair * n * n for each, n in zip(work, counts, strict=True))
