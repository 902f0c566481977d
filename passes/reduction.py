"""What token merging and its peers have in common: their options, and the places where their nodes are inserted."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, cast

from torch import fx

from ..errors import ArgumentError
from .schedules import SCHEDULES, Schedule, Start, Work, spread_amounts

Blocks = Literal["second-half", "all"] | Sequence[int]


class State(NamedTuple):
    """What is known of the tokens at one place of the graph.

    Attributes:
        sizes: How many patches each token stands for, (B, N); None as long as each stands for itself.
        places: The place of each token in the dense stream, (B, N); None while all are there.
    """

    sizes: fx.Node | None
    places: fx.Node | None


class Attended(NamedTuple):
    """A place where the tokens of a block become fewer.

    Attributes:
        number: How many of the chosen blocks come before it.
        r: How many tokens to remove; at most half of the patches.
        queries: Queries of the block's attention, (B, heads, N, D).
        keys: Its keys, of the same shape.
        values: Its values, of the same shape.
        scale: What it multiplies logits by; None for 1 / sqrt(D).
        tokens: The result of the residual addition after it, (B, N, C).
        prefix: Tokens before the patches. They stay.
        suffix: Tokens behind the patches. They stay.
        grid: Sizes of the patches' grid, numbers or nodes.
    """

    number: int
    r: int
    queries: fx.Node
    keys: fx.Node
    values: fx.Node
    scale: object
    tokens: fx.Node
    prefix: int
    suffix: int
    grid: tuple[int | fx.Node, ...]

    @property
    def ends(self) -> tuple[int, ...]:
        """Prefix and suffix, as the last arguments of functions that take both."""
        return (self.prefix, self.suffix) if self.suffix else (self.prefix,)

    def create(self, name: str, function: Callable[..., Any], *arguments: Any) -> fx.Node:
        """A node at the graph's insertion point."""
        return self.tokens.graph.create_node("call_function", function, arguments, name=f"papr_{name}_{self.number}")

    def parts(self, node: fx.Node, *names: str) -> list[fx.Node]:
        """The parts of a tuple, as nodes of those names."""
        return [self.create(name, operator.getitem, node, place) for place, name in enumerate(names)]


@dataclass(frozen=True)
class Reduction(ABC):
    """A way to reduce tokens from block to block, for `transform(..., merge=...)`.

    Attributes:
        r: Tokens to remove in each block, or a list with one for each of these blocks; half of the patches at most.
        blocks: Which blocks: "second-half", "all", or their numbers.
        proportional: Whether attention weights tokens by the patches that they stand for: yes for models trained with labels,
            no for MAE (PaPr, Sec. 4.1). Averages over tokens are weighted in any case.
        schedule: "constant", r in each block; or for the same multiply-accumulates "late", more in late blocks than in early
            ones, or "share", the same share of the patches in each block.

    Raises:
        ArgumentError: A value is out of range.
    """

    needs_places: ClassVar[bool] = False
    """Whether it asks where tokens lie in the image."""

    r: int | Sequence[int] = 8
    blocks: Blocks = "second-half"
    proportional: bool = True
    schedule: Schedule = field(default="constant", kw_only=True)

    def __post_init__(self) -> None:
        blocks, schedule = cast(Any, self.blocks), cast(Any, self.schedule)
        numbers = _numbers_of(self.r)
        if numbers is None or not all(type(number) is int and number >= 0 for number in numbers):
            raise ArgumentError(
                "merge: r (tokens to remove in each block) must be a whole number, 0 or more, or a list of such numbers, one "
                f"for each block, not {self.r!r}"
            )
        if not isinstance(self.r, int):
            object.__setattr__(self, "r", numbers)
        if schedule not in SCHEDULES:
            raise ArgumentError(f"merge: schedule must be one of {', '.join(map(repr, SCHEDULES))}, not {schedule!r}")
        if schedule != "constant" and not isinstance(self.r, int):
            raise ArgumentError(f"merge: schedule={schedule!r} spreads one r over the blocks, and r is a list: {self.r!r}")
        words = isinstance(blocks, str) and blocks in ("second-half", "all")
        listed = isinstance(blocks, Sequence) and not isinstance(blocks, str)
        if not words and not (listed and all(type(n) is int for n in cast("Sequence[object]", blocks))):
            raise ArgumentError(f'merge: blocks must be "second-half", "all" or numbers of blocks, not {blocks!r}')

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of `r`: one, or one for each block."""
        return (self.r,) if isinstance(self.r, int) else tuple(self.r)

    @property
    def removes(self) -> bool:
        """Whether any token is removed."""
        return any(self.numbers)

    @property
    def words(self) -> str:
        """What `r` is on the command line: 8, 8:late, 8:share or 4,4,8,8."""
        spread = "" if self.schedule == "constant" else f":{self.schedule}"
        return ",".join(map(str, self.numbers)) + spread

    def amounts(self, start: Start, work: Sequence[Work]) -> tuple[int, ...]:
        """How many tokens each block is to remove.

        Args:
            start: The tokens before the first of these blocks, on the traced images.
            work: What follows on the reduction of each block.
        """
        if not isinstance(self.r, int):
            return tuple(self.r)
        return spread_amounts(self.schedule, self.r, start, work)

    @abstractmethod
    def insert(self, at: Attended, state: State) -> tuple[fx.Node, State]:
        """Inserts nodes at the graph's insertion point. Returns the remaining tokens and what is known of them."""


def _numbers_of(r: object) -> tuple[object, ...] | None:
    """The numbers of r, or what stands in their place; None if it is neither a number nor a list."""
    if isinstance(r, str) or not isinstance(r, int | Sequence):
        return None
    return (r,) if isinstance(r, int) else tuple(cast("Sequence[object]", r)) or None


def chosen_blocks(names: Sequence[str], reduction: Reduction) -> list[str]:
    """The blocks in which a reduction removes tokens, in order.

    Raises:
        ArgumentError: A number is out of range, or `r` is a list that is shorter or longer.
    """
    chosen = _picked(names, reduction.blocks)
    if not isinstance(reduction.r, int) and len(reduction.r) != len(chosen):
        raise ArgumentError(
            f"merge: r has {len(reduction.r)} numbers, and blocks={reduction.blocks!r} picks {len(chosen)} of {len(names)} "
            f"blocks: give {len(chosen)} numbers, or other blocks"
        )
    return chosen


def _picked(names: Sequence[str], blocks: Blocks) -> list[str]:
    if blocks == "all":
        return list(names)
    if blocks == "second-half":
        return list(names[len(names) // 2 :])
    numbers = cast("Sequence[int]", blocks)
    wrong = [number for number in numbers if not -len(names) <= number < len(names)]
    if wrong:
        raise ArgumentError(f"merge: there is no block {wrong[0]} among {len(names)}, which are 0 to {len(names) - 1}")
    return [names[place] for place in sorted({number % len(names) for number in numbers})]
