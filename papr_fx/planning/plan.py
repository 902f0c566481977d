"""Everything a rewritten graph follows from: per mode the dense graph and its sites, and the keep ratio."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from torch import fx

from ..dataflow.positionwise import Layout
from ..dataflow.repairs import Repairs
from ..errors import NoSiteError
from ..ops import TokenRows
from ..passes import gather_positions, narrow_rows, prune_pixels, prune_tokens, reduce_tokens, splice_proposal
from ..passes.kinds import Kind
from ..passes.narrow_rows import Narrowing
from ..passes.prune_pixels import PixelChoice, PixelSite, Skipped
from ..passes.prune_tokens import TokenSite
from ..passes.reduce_tokens import ReductionSites, Remaining
from ..passes.reduction import Reduction
from ..proposals.network import SignificanceNet
from ..tracing.roles import find
from ..versions import without_types
from .example import Example
from .signature import Signature

# Called with the name of a pass and the graph after it.
Stage = Callable[[str, fx.Graph], None]


@dataclass(frozen=True)
class Choice:
    """One choice of positions in a rewritten graph.

    Attributes:
        number: Which one; the same as in the roles of its nodes.
        rows: The grid on the traced images, and the tokens before it.
        stream: Name of a node of the dense graph whose positions are in this order.
        layout: Axes of its value.
        where: Words that say where it is made.
    """

    number: int
    rows: TokenRows
    stream: str
    layout: Layout
    where: str


@dataclass(frozen=True)
class Target:
    """What a rewrite aims at, in either mode.

    Attributes:
        z: Keep ratio in (0, 1].
        layout: Axes of the images by letter: BCHW; BCTHW or BTCHW for clips.
        dynamic: Whether the model takes several image sizes, so that grids are read at run time.
        fine: Whether the map is as fine as the clips, and is averaged over tubelets.
    """

    z: float
    layout: str
    dynamic: bool
    fine: bool = False


@dataclass(frozen=True)
class TokenPlan:
    """One mode of a token model: tokens are dropped before the first block.

    Attributes:
        dense: The traced graph.
        blocks: Qualified names of the trunk's repeated blocks.
        suffix: How many tokens stand behind the patches.
        repairs: What else must change for the blocks to run on fewer tokens.
        reduction: How tokens become fewer from block to block, if they do.
        reduced: Where.
        narrowing: Where only the rows are computed that are read later.
    """

    dense: fx.Graph
    blocks: tuple[str, ...]
    suffix: int
    repairs: Repairs
    reduction: Reduction | None
    reduced: ReductionSites
    narrowing: Narrowing
    kind = "tokens"

    @property
    def reduces(self) -> bool:
        """Whether tokens become fewer from block to block."""
        return self.reduction is not None and self.reduction.removes

    def site(self, graph: fx.Graph) -> TokenSite:
        """The token stream of a traced graph of the model."""
        return prune_tokens.find_site(graph, self.blocks, self.suffix)

    def prune(self, graph: fx.Graph, target: Target, stage: Stage) -> None:
        """Rewrites `graph`, a traced graph of the model, in place."""
        site = self.site(graph)
        before = site.stream.next
        grid = prune_tokens.runtime_grid(graph, site, before, target.layout) if target.dynamic else site.rows.grid
        keep = None
        if target.z < 1:
            images = splice_proposal.find_site(graph, fine=target.fine)
            selection = splice_proposal.Selection(grid, target.z, site.rows.prefix, site.rows.suffix)
            keep = splice_proposal.rewrite(graph, images, before, selection)
            stage("splice_proposal", graph)
            gather_positions.rewrite(graph, self.repairs, site, keep)
            stage("gather_positions", graph)
            prune_tokens.rewrite(graph, site, keep)
            stage("prune_tokens", graph)
        if self.reduction is not None and self.reduces:
            patches = site.rows.kept(target.z) - site.rows.others
            reduce_tokens.rewrite(graph, self.reduced, self.reduction, Remaining(grid, site.rows, patches, keep))
            stage("reduce_tokens", graph)
        if target.z < 1 and self.narrowing.sites:
            narrow_rows.rewrite(graph, self.narrowing)
            stage("narrow_rows", graph)

    def choices(self) -> tuple[Choice, ...]:
        """What is chosen: one set of tokens."""
        site = self.site(self.dense)
        where = f"at `{site.stream.name}` before `{site.block}`"
        return (Choice(0, site.rows, site.stream.name, "BNC", where),)


@dataclass(frozen=True)
class PixelPlan:
    """One mode of a hierarchical model: pixel operators run on some positions.

    Attributes:
        dense: The traced graph.
        sites: The pixel operators.
        skipped: Residual branches that stay dense.
        background: What dropped positions hold afterwards: "keep", "zero" or "auto".
        training: Which mode.
    """

    dense: fx.Graph
    sites: tuple[PixelSite, ...]
    skipped: tuple[Skipped, ...]
    background: str
    training: bool
    kind = "pixels"
    reduces = False

    def prune(self, graph: fx.Graph, target: Target, stage: Stage) -> None:
        """Rewrites `graph`, a traced graph of the model, in place."""
        choice = PixelChoice(target.z, self.background, target.layout, self.training, target.dynamic, target.fine)
        prune_pixels.rewrite(graph, self.sites, choice)
        stage("prune_pixels", graph)

    def without(self, additions: Collection[str], reason: str) -> PixelPlan:
        """The same plan, except that the operators that feed `additions` stay dense."""
        dropped = (site for site in self.sites if site.addition in additions)
        return replace(
            self,
            sites=tuple(site for site in self.sites if site.addition not in additions),
            skipped=(*self.skipped, *(Skipped(site.addition, f"`{site.name}`: {reason}") for site in dropped)),
        )

    def backgrounds(self) -> list[str]:
        """What dropped positions of each site hold afterwards: "keep" or "zero"."""
        return [prune_pixels.background_of(site, self.background, self.training) for site in self.sites]

    def kept_rows(self, site: PixelSite, z: float) -> int:
        """Rows that an operator runs on. z is the share of the grid: tokens before it are kept, but do not count."""
        return site.rows.prefix + TokenRows(site.rows.grid).kept(z)

    def choices(self) -> tuple[Choice, ...]:
        """What is chosen: one set of positions per grid."""
        first = {site.rows.grid: site for site in reversed(self.sites)}
        grids = dict.fromkeys(site.rows.grid for site in self.sites)
        return tuple(
            Choice(number, TokenRows(grid), *first[grid].ordered, f"on grid {grid}, first for `{first[grid].addition}`")
            for number, grid in enumerate(grids)
        )


ModePlan = TokenPlan | PixelPlan


@dataclass(frozen=True)
class Refused:
    """A mode in which the model cannot be pruned, and why."""

    reason: str


@dataclass(frozen=True)
class Plan:
    """Everything a rewritten graph follows from, so that another keep ratio is one more rewrite of the dense graph.

    Attributes:
        name: Class name of the model.
        eval: The plan for eval mode.
        train: The plan for training mode. It is that for eval mode itself where both have the same graph.
        opened: Qualified names of the modules that were traced through.
        example: The images that the graphs were traced with.
        target: Keep ratio and geometry.
        signature: The arguments that the module is called with.
        output: What the module returns: "logits", as the model's forward does, or "features".
        fallback: Why a model was pruned by pixels although tokens come first; empty otherwise.
    """

    name: str
    eval: ModePlan
    train: ModePlan | Refused
    opened: frozenset[str]
    example: Example
    target: Target
    signature: Signature
    output: str = "logits"
    fallback: str = ""

    @property
    def z(self) -> float:
        """Keep ratio in (0, 1]."""
        return self.target.z

    @property
    def kind(self) -> str:
        """What is pruned: "tokens" or "pixels"."""
        return self.eval.kind

    @property
    def reduction(self) -> Reduction | None:
        """How tokens become fewer from block to block, if they do."""
        return self.eval.reduction if isinstance(self.eval, TokenPlan) else None

    @property
    def narrows(self) -> bool:
        """Whether only the rows are computed, in either mode, that are read later."""
        return any(isinstance(mode, TokenPlan) and mode.narrowing.sites for mode in (self.eval, self.train))

    @property
    def one_graph(self) -> bool:
        """Whether training and eval mode have the same rewritten graph."""
        if self.train is self.eval:
            return True
        if not isinstance(self.train, PixelPlan) or not isinstance(self.eval, PixelPlan):
            return False
        same_sites = self.train.dense is self.eval.dense and self.train.sites == self.eval.sites
        return same_sites and self.train.backgrounds() == self.eval.backgrounds()

    def mode(self, training: bool) -> ModePlan:
        """The plan of one mode.

        Raises:
            NoSiteError: The model cannot be pruned in it.
        """
        found = self.train if training else self.eval
        if isinstance(found, Refused):
            raise NoSiteError(f"{self.name} cannot be pruned in {'training' if training else 'eval'} mode: {found.reason}")
        return found

    def at(self, z: float) -> Plan:
        """The same plan for another keep ratio.

        Raises:
            NoSiteError: More tokens should be removed from block to block than it leaves.
        """
        if isinstance(self.eval, TokenPlan) and self.eval.reduction is not None:
            reduce_tokens.check_amounts(self.eval.reduced, self.eval.reduction, self.eval.site(self.eval.dense).rows, z)
        return replace(self, target=replace(self.target, z=z))

    def seeing(self, network: SignificanceNet) -> Plan:
        """The same plan for the maps of a network."""
        return replace(self, target=replace(self.target, fine=network.fine))

    def reducing(self, reduction: Reduction | None) -> Plan:
        """The same plan of a token model with another reduction, or with none."""
        return self._each(lambda mode: replace(mode, reduction=reduction) if isinstance(mode, TokenPlan) else mode)

    def computing_all_rows(self, reason: str = "") -> Plan:
        """The same plan of a token model without narrowing, for this reason."""
        whole = Narrowing(reason=reason)
        return self._each(lambda mode: replace(mode, narrowing=whole) if isinstance(mode, TokenPlan) else mode)

    def without(self, additions: Collection[str], reason: str) -> Plan:
        """The same plan of a hierarchical model, except that the operators that feed `additions` stay dense."""
        return self._each(lambda mode: mode.without(additions, reason) if isinstance(mode, PixelPlan) else mode)

    def _each(self, change: Callable[[ModePlan], ModePlan]) -> Plan:
        changed, other = change(self.eval), self.train
        train = changed if other is self.eval else other if isinstance(other, Refused) else change(other)
        return replace(self, eval=changed, train=train)

    def dense_graph(self, training: bool) -> fx.Graph:
        """A copy of the traced graph."""
        return without_types(copy.deepcopy(self.mode(training).dense))

    def rewrite(self, training: bool, stage: Stage = lambda name, graph: None) -> fx.Graph:
        """The graph for keep ratio `z`. At 1 it is the dense one, unless tokens are reduced: nothing is left to choose."""
        graph = self.dense_graph(training)
        stage("trace", graph)
        return self.prune(graph, training, stage) if self.z < 1 or self.mode(training).reduces else graph

    def prune(self, graph: fx.Graph, training: bool, stage: Stage = lambda name, graph: None) -> fx.Graph:
        """Rewrites a traced graph of the model, in place, and returns it."""
        self.mode(training).prune(graph, self.target, stage)
        graph.lint()
        return graph

    def choices(self, training: bool) -> tuple[Choice, ...]:
        """Where positions are chosen, in order."""
        return self.mode(training).choices()


def keep_of(graph: fx.Graph, choice: Choice) -> fx.Node:
    """The node of a rewritten graph that holds the kept indices of `choice`."""
    return find(graph, Kind.KEEP, choice.number)
