"""What token merging and its peers have in common: their options, and the places where their nodes are inserted."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

from torch import fx

from ..errors import ArgumentError

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
        number: How many such places come before it.
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
        r: Tokens to remove in each block; at most half of the patches.
        blocks: Which blocks: "second-half", "all", or their numbers.
        proportional: Whether attention weights tokens by the patches that they stand for: yes for models trained with labels,
            no for MAE (PaPr, Sec. 4.1). Averages over tokens are weighted in any case.

    Raises:
        ArgumentError: A value is out of range.
    """

    r: int = 8
    blocks: Blocks = "second-half"
    proportional: bool = True

    def __post_init__(self) -> None:
        r, blocks = cast(Any, self.r), cast(Any, self.blocks)
        if isinstance(r, bool) or not isinstance(r, int) or r < 0:
            raise ArgumentError(f"merge: r (tokens to remove in each block) must be a whole number, 0 or more, not {r!r}")
        words = isinstance(blocks, str) and blocks in ("second-half", "all")
        numbers = isinstance(blocks, Sequence) and not isinstance(blocks, str)
        if not words and not (numbers and all(type(n) is int for n in cast("Sequence[object]", blocks))):
            raise ArgumentError(f'merge: blocks must be "second-half", "all" or numbers of blocks, not {blocks!r}')

    @abstractmethod
    def insert(self, at: Attended, state: State) -> tuple[fx.Node, State]:
        """Inserts nodes at the graph's insertion point. Returns the remaining tokens and what is known of them."""


def chosen_blocks(names: Sequence[str], blocks: Blocks) -> list[str]:
    """The blocks that `blocks` picks from `names`, in order.

    Raises:
        ArgumentError: A number is out of range.
    """
    if blocks == "all":
        return list(names)
    if blocks == "second-half":
        return list(names[len(names) // 2 :])
    numbers = cast("Sequence[int]", blocks)
    wrong = [number for number in numbers if not -len(names) <= number < len(names)]
    if wrong:
        raise ArgumentError(f"merge: there is no block {wrong[0]} among {len(names)}, which are 0 to {len(names) - 1}")
    return [names[place] for place in sorted({number % len(names) for number in numbers})]
