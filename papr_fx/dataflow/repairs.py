"""What must change in a graph for it to run on fewer tokens. Nodes are stored by name, so that it holds for copies.

Several things here count only some of the tokens: all, those without prefix tokens, those without suffix tokens, or patches
alone. Which ones is called `span`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..ops.rows import Span


class Pick(NamedTuple):
    """How a table is gathered.

    Attributes:
        axes: The axes that count positions, once the table has `rank` axes.
        rank: Number of axes of what the table meets. The table gets leading ones.
        span: The tokens that the axes count.
    """

    axes: tuple[int, ...]
    rank: int
    span: Span


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
    """A reshape that lays the patches out as their grid, which becomes one column.

    Attributes:
        user: The reshape.
        place: The place of the grid's first size among its sizes.
        axes: Axes of the grid.
    """

    user: str
    place: int
    axes: int


@dataclass(frozen=True)
class PlaceSite:
    """A node that lays the patches out as their grid, before which they are put back in their places.

    Attributes:
        layout: The node.
        value: What it lays out.
        axis: The axis of the patches there.
        place: The place of the grid's first size among the sizes that the node gets; None if it gets none.
        counted: Whether some of these sizes are computed from the number of tokens.
        stacked: How many values of the batch lie one after the other along the batch axis of the value.
    """

    layout: str
    value: str
    axis: int
    place: int | None
    counted: bool
    stacked: int = 1


@dataclass(frozen=True)
class Count:
    """The size of a table, where code computes with it and with sizes of the tokens.

    Attributes:
        size: The node.
        span: The tokens that it counts.
    """

    size: str
    span: Span


@dataclass(frozen=True)
class Numbering:
    """A call that numbers the positions from first to last, such as `torch.arange`.

    Attributes:
        call: The node.
        size: The node of the token count that it reads.
        span: The tokens that this counts.
    """

    call: str
    size: str
    span: Span


@dataclass(frozen=True)
class Repairs:
    """All changes that a graph needs."""

    tables: tuple[TableSite, ...] = ()
    views: tuple[View, ...] = ()
    counts: tuple[Count, ...] = ()
    numberings: tuple[Numbering, ...] = ()
    places: tuple[PlaceSite, ...] = ()

    def spans(self) -> list[tuple[str, Span]]:
        """The names of nodes that count tokens, and which they count."""
        counts = [(count.size, count.span) for count in self.counts]
        return [(t.value, t.pick.span) for t in self.tables] + counts + [(n.call, n.span) for n in self.numberings]

    def first_node(self) -> str | None:
        """The name of a node that needs a change; None if none does."""
        names = [site.value for site in self.tables] + [view.user for view in self.views]
        names += [site.layout for site in self.places]
        names += [count.size for count in self.counts] + [numbering.call for numbering in self.numberings]
        return names[0] if names else None
