"""What a rewritten graph follows from: the dense graphs, the operator that is pruned, and the keep ratio."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from torch import fx

from ..dataflow.positions import Layout
from ..errors import NoSiteError
from ..passes import gather_positions, prune_pixels, prune_tokens, reduce_tokens, splice_proposal


@dataclass(frozen=True)
class Choice:
    """One choice of positions in a rewritten graph.

    Attributes:
        suffix: Ends the names of its nodes: `papr_psm{suffix}`, `papr_keep{suffix}`.
        grid: Rows and columns on the traced images, of clips (frames, rows, columns).
        prefix: Tokens in front of the grid, always kept.
        stream: The node of the dense graph whose positions are in this order.
        layout: Axes of its value.
        where: Words that name the place.
    """

    suffix: str
    grid: tuple[int, ...]
    prefix: int
    stream: str
    layout: Layout
    where: str


@dataclass(frozen=True)
class Tokens:
    """Tokens are dropped in front of the first block.

    Attributes:
        blocks: Qualified names of the trunk's repeated blocks.
        positions: What else must change for the blocks to run on fewer tokens, for both values of `training`.
        reduction: How tokens become fewer from block to block, if they do.
        reduced: Where, for both values of `training`.
    """

    blocks: tuple[str, ...]
    positions: Mapping[bool, gather_positions.Found]
    reduction: reduce_tokens.Reduction | None
    reduced: Mapping[bool, reduce_tokens.Found]
    mode = "tokens"
    follows_training = False

    def rewrite(self, graph: fx.Graph, plan: Plan, training: bool) -> None:
        """Rewrites a traced graph of the model, in place."""
        site = prune_tokens.find_site(graph, self.blocks)
        before = site.stream.next
        grid = prune_tokens.runtime_grid(graph, site, before) if plan.dynamic else site.grid
        keep = None
        if plan.z < 1:
            images = splice_proposal.find_site(graph)
            keep = splice_proposal.rewrite(graph, images, before, grid, plan.z, prefix=site.prefix)
            gather_positions.rewrite(graph, self.positions[training], site.stream, keep, site.prefix)
            prune_tokens.rewrite(graph, site, keep)
        if self.reduction and self.reduction.r:
            reduce_tokens.rewrite(graph, self.reduced[training], self.reduction, grid=grid, prefix=site.prefix, keep=keep)

    def choices(self, graph: fx.Graph, training: bool) -> tuple[Choice, ...]:
        """What is chosen in the dense `graph`: one set of tokens."""
        site = prune_tokens.find_site(graph, self.blocks)
        where = f"at `{site.stream.name}` in front of `{site.block}`"
        return (Choice("", site.grid, site.prefix, site.stream.name, "BNC", where),)


@dataclass(frozen=True)
class Pixels:
    """Pixel operators run on some positions at each of `sites`, for both values of `training`."""

    sites: Mapping[bool, tuple[prune_pixels.Site, ...]]
    left: Mapping[bool, tuple[prune_pixels.Left, ...]]
    background: str
    mode = "pixels"

    @property
    def follows_training(self) -> bool:
        """Whether the rewrite differs in training mode even where the dense graph does not."""
        return self.background == "auto" and any(site.convolution for site in self.sites[True])

    def rewrite(self, graph: fx.Graph, plan: Plan, training: bool) -> None:
        """Rewrites a traced graph of the model, in place."""
        prune_pixels.rewrite(
            graph,
            self.sites[training],
            plan.z,
            self.background,
            layout=plan.layout,
            training=training,
            dynamic=plan.dynamic,
        )

    def without(self, merges: Collection[str], reason: str) -> Pixels:
        """The same but for the operators that feed `merges`, which are left alone."""
        sites = dict(self.sites)
        left = dict(self.left)
        for mode, some in self.sites.items():
            sites[mode] = tuple(site for site in some if site.merge not in merges)
            dropped = (site for site in some if site.merge in merges)
            left[mode] = (*left[mode], *(prune_pixels.Left(site.merge, f"`{site.name}`: {reason}") for site in dropped))
        return replace(self, sites=sites, left=left)

    def choices(self, graph: fx.Graph, training: bool) -> tuple[Choice, ...]:
        """What is chosen in the dense graph: one set of positions for each grid."""
        first = {site.grid: site for site in reversed(self.sites[training])}
        return tuple(
            Choice(
                f"_{'x'.join(map(str, grid))}",
                grid,
                0,
                *first[grid].ordered,
                f"on grid {grid}, first for `{first[grid].merge}`",
            )
            for grid in dict.fromkeys(site.grid for site in self.sites[training])
        )


@dataclass(frozen=True)
class Plan:
    """All that a rewritten graph follows from, so that another keep ratio is one more rewrite of the dense graph.

    Attributes:
        name: Class name of the model.
        dense: The traced graph for each value of `training`; a text is the reason why there is none.
        operator: What is pruned.
        opened: Qualified names of the modules that were traced through.
        dynamic: Whether the model takes several image sizes, so that the grid is read at run time.
        shape: Shape of the images that the graph was traced with.
        layout: Its axes by letter: BCHW, or BCTHW or BTCHW for clips.
        z: Keep ratio in (0, 1].
        output: What the module returns: "logits", as the model's forward does, or "features".
    """

    name: str
    dense: Mapping[bool, fx.Graph | str]
    operator: Tokens | Pixels
    opened: frozenset[str]
    dynamic: bool
    shape: tuple[int, ...]
    layout: str
    z: float
    output: str = "logits"

    @property
    def reduction(self) -> reduce_tokens.Reduction | None:
        """How tokens become fewer from block to block, if they do."""
        return self.operator.reduction if isinstance(self.operator, Tokens) else None

    @property
    def pruning(self) -> Plan:
        """The same without a reduction."""
        operator = replace(self.operator, reduction=None) if isinstance(self.operator, Tokens) else self.operator
        return replace(self, operator=operator)

    @property
    def one_graph(self) -> bool:
        """Whether training and eval mode have the same rewritten graph."""
        return self.dense[True] is self.dense[False] and not self.operator.follows_training

    def dense_graph(self, training: bool) -> fx.Graph:
        """A copy of the traced graph."""
        graph = self.dense[training]
        if isinstance(graph, str):
            raise NoSiteError(f"{self.name} cannot be pruned in {'training' if training else 'eval'} mode: {graph}")
        return copy.deepcopy(graph)

    def rewrite(self, training: bool) -> fx.Graph:
        """The graph for keep ratio `z`: the dense one at 1 but for a reduction, as nothing is left to choose."""
        graph = self.dense_graph(training)
        return graph if self.z == 1 and not self.reduction else self.prune(graph, training)

    def prune(self, graph: fx.Graph, training: bool) -> fx.Graph:
        """Rewrites a traced graph of the model, in place, and returns it."""
        self.operator.rewrite(graph, self, training)
        graph.lint()
        return graph

    def choices(self, training: bool) -> tuple[Choice, ...]:
        """Where positions are chosen, in order."""
        return self.operator.choices(self.dense_graph(training), training)
