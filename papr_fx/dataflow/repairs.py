"""What must change in a graph for it to run on fewer tokens. Nodes are stored by name, so that it holds for copies.

Several things here count positions from a token on: from 0, prefix tokens included, or from the first patch on. That token's
number is called `first`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Pick(NamedTuple):
    """How a table is gathered.

    Attributes:
        axes: The axes that count positions, once the table has `rank` axes.
        rank: Number of axes of what the table meets. The table gets leading ones.
        first: The token from which on positions are counted.
    """

    axes: tuple[int, ...]
    rank: int
    first: int


@dataclass(frozen=True)
class TableSite:
    """A table, a value with an entry per position, that meets the tokens.

    Attributes:
        value: The table.
        pick: How it is gathered.
        users: The operations that read it or a table computed alike, each with the name of what it reads.
    """

    value: str
    pick: Pick
    users: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class View:
    """A reshape that lays the tokens out as their grid.

    Attributes:
        user: The reshape.
        place: The place of the grid's first size among its sizes.
        axes: Axes of the grid.
    """

    user: str
    place: int
    axes: int


@dataclass(frozen=True)
class Count:
    """The size of a table, where code computes with it and with sizes of the tokens.

    Attributes:
        size: The node.
        first: The token from which on it counts.
    """

    size: str
    first: int


@dataclass(frozen=True)
class Numbering:
    """A call that numbers the positions from first to last, such as `torch.arange`.

    Attributes:
        call: The node.
        size: The node of the token count that it reads.
        first: The token from which on that counts.
    """

    call: str
    size: str
    first: int


@dataclass(frozen=True)
class Repairs:
    """All changes that a graph needs."""

    tables: tuple[TableSite, ...] = ()
    views: tuple[View, ...] = ()
    counts: tuple[Count, ...] = ()
    numberings: tuple[Numbering, ...] = ()

    def first_node(self) -> str | None:
        """The name of a node that needs a change; None if none does."""
        names = [site.value for site in self.tables] + [view.user for view in self.views]
        names += [count.size for count in self.counts] + [numbering.call for numbering in self.numberings]
        return names[0] if names else None
