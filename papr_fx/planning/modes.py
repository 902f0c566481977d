"""How a model is pruned in one mode, eval or training: its traced graph, its sites, and the passes in their order."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from torch import fx

from ..dataflow.positionwise import Layout
from ..dataflow.repairs import Repairs
from ..ops import TokenRows
from ..passes import (
    coarsen_background,
    embed_kept_patches,
    gather_positions,
    narrow_rows,
    prune_pixels,
    prune_tokens,
    reduce_tokens,
    restore_places,
    splice_proposal,
)
from ..passes.embed_kept_patches import Embedding
from ..passes.narrow_rows import Narrowing
from ..passes.prune_pixels import PixelChoice, PixelSite, Skipped
from ..passes.prune_tokens import TokenSite
from ..passes.reduce_tokens import ReductionSites, Remaining
from ..passes.reduction import Reduction
from ..tracing.graphs import nodes_by_name

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
        coarse: Whether patches that are not kept become coarse tokens.
    """

    number: int
    rows: TokenRows
    stream: str
    layout: Layout
    where: str
    coarse: bool = False

    def kept(self, z: float) -> int:
        """Number of rows that keep ratio `z` leaves."""
        return self.rows.kept(z, coarse=self.coarse)


@dataclass(frozen=True)
class Target:
    """What a rewrite aims at, in either mode.

    Attributes:
        z: Keep ratio in (0, 1].
        layout: Axes of the images by letter: BCHW; BCTHW or BTCHW for clips.
        sizes: Shapes of images of other sizes that the model takes, one of each kind that was tried; empty if it takes one.
        fine: Whether the map is as fine as the clips, and is averaged over tubelets.
        restore: What dropped places hold where tokens are laid out as their grid: the nearest token, or zero.
    """

    z: float
    layout: str
    sizes: tuple[tuple[int, ...], ...] = ()
    fine: bool = False
    restore: str = "nearest"

    @property
    def dynamic(self) -> bool:
        """Whether grids are read at run time."""
        return bool(self.sizes)


@dataclass(frozen=True)
class TokenOptions:
    """How a model is pruned by tokens.

    Attributes:
        z: Keep ratio, below 1.
        merge: How tokens become fewer from block to block, if they do.
        narrow: Whether to leave out rows that nobody reads.
        coarse: Whether patches that are not kept become coarse tokens.
        restore: What dropped places hold where tokens are laid out as their grid.
        fuse: Whether attention that is written out becomes one call.
    """

    z: float
    merge: Reduction | None
    narrow: bool
    coarse: bool = False
    restore: str = "nearest"
    fuse: bool = True


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
        embedding: Where only the kept patches are embedded.
        narrowing: Where only the rows are computed that are read later.
        coarse: Whether patches that are not kept become coarse tokens.
    """

    dense: fx.Graph
    blocks: tuple[str, ...]
    suffix: int
    repairs: Repairs
    reduction: Reduction | None
    reduced: ReductionSites
    embedding: Embedding
    narrowing: Narrowing
    coarse: bool = False
    kind = "tokens"

    @property
    def reduces(self) -> bool:
        """Whether tokens become fewer from block to block."""
        return self.reduction is not None and self.reduction.removes

    @property
    def narrows(self) -> bool:
        """Whether anything is left out that nobody reads: rows of the last tokens, or dropped patches."""
        return bool(self.narrowing.sites or self.embedding.node)

    def computing_all(self, reason: str) -> TokenPlan:
        """The same plan with nothing left out, for this reason."""
        return replace(self, narrowing=Narrowing(reason=reason), embedding=Embedding(reason=reason))

    def computing_more(self, reason: str) -> TokenPlan:
        """The same plan with all patches embedded, for this reason; with nothing left out if they are already."""
        return replace(self, embedding=Embedding(reason=reason)) if self.embedding.node else self.computing_all(reason)

    def site(self, graph: fx.Graph) -> TokenSite:
        """The token stream of a traced graph of the model."""
        return prune_tokens.find_site(graph, self.blocks, self.suffix)

    def prune(self, graph: fx.Graph, target: Target, stage: Stage) -> None:
        """Rewrites `graph`, a traced graph of the model, in place."""
        site = self.site(graph)
        embedding = self.embedding if target.z < 1 else Embedding()
        conv = nodes_by_name(graph)[embedding.node] if embedding.node else None
        before = conv or site.stream.next
        grid: splice_proposal.Sizes = site.rows.grid
        if target.dynamic and embedding.node:
            grid = embed_kept_patches.runtime_grid(graph, embedding)
        elif target.dynamic:
            grid = prune_tokens.runtime_grid(graph, site, before, target.layout)
        keep = None
        if target.z < 1:
            images = splice_proposal.find_site(graph, fine=target.fine)
            selection = splice_proposal.Selection(grid, target.z, site.rows.prefix, site.rows.suffix, coarse=self.coarse)
            keep = splice_proposal.rewrite(graph, images, before, selection)
            stage("splice_proposal", graph)
            coarsened = None
            if self.coarse:
                twice = coarsen_background.find_site(site, target.layout)
                coarsened = coarsen_background.rewrite(graph, twice, site, keep, grid, conv)
                stage("coarsen_background", graph)
            if embedding.node:
                embed_kept_patches.rewrite(graph, embedding, site, keep, coarsened)
                stage("embed_kept_patches", graph)
            gather_positions.rewrite(graph, self.repairs, site, keep, coarsened.members if coarsened else None)
            stage("gather_positions", graph)
            prune_tokens.rewrite(graph, site, keep, coarsened.tokens if coarsened else None)
            stage("prune_tokens", graph)
            places = restore_places.Places(site.rows, grid, keep, target.restore, self.coarse)
            restore_places.rewrite(graph, self.repairs.places, places)
            stage("restore_places", graph)
        if self.reduction is not None and self.reduces:
            patches = site.rows.kept(target.z, coarse=self.coarse) - site.rows.others
            reduce_tokens.rewrite(graph, self.reduced, self.reduction, Remaining(grid, site.rows, patches, keep))
            stage("reduce_tokens", graph)
        if target.z < 1 and self.narrowing.sites:
            narrow_rows.rewrite(graph, self.narrowing)
            stage("narrow_rows", graph)

    def choices(self) -> tuple[Choice, ...]:
        """What is chosen: one set of tokens."""
        site = self.site(self.dense)
        where = f"at `{site.stream.name}` before `{site.block}`"
        return (Choice(0, site.rows, site.stream.name, "BNC", where, self.coarse),)


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
        """Rows that an operator runs on. z is the share of the grid: other tokens are kept, but do not count."""
        return site.rows.others + TokenRows(site.rows.grid).kept(z)

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
