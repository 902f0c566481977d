"""What a rewrite did: sites, tokens and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from math import prod
from typing import cast

from tabulate import tabulate
from torch import fx

from ..ops import TokenRows, keep_count, quad_counts, quad_grid
from ..passes.kinds import Kind
from ..planning.modes import PixelPlan, TokenPlan
from ..planning.module import PrunedModule, checked_module
from ..tracing.graphs import ancestors, nodes_by_name, shape_of
from ..tracing.macs import count_macs_by_node
from ..tracing.results import shared_results
from ..tracing.roles import find_all, number_of

_LIGHTER = "take a lighter proposal, or a smaller proposal_size"


@dataclass(frozen=True)
class SiteReport:
    """One place where positions are dropped.

    Attributes:
        name: For tokens, the node whose positions are gathered and the module it feeds; for pixels, the operator's last layer.
        grid: (rows, columns); (frames, rows, columns) for clips.
        prefix: Tokens before the grid, always kept.
        dense: Positions before, with prefix and suffix.
        kept: Positions after, with prefix and suffix.
        dense_macs: Multiply-accumulates per image of what runs on these positions: a pixel operator, or everything after the
            tokens.
        pruned_macs: The same after pruning.
        background: What dropped positions hold afterwards: "keep" (the residual) or "zero"; for tokens "coarse", or empty.
        suffix: Tokens behind the grid, always kept.
        coarse: Kept tokens that stand for a cell of 2 x 2 patches each.
        dropped: Positions that are not kept; with a coarse background, cells of 2 x 2 patches that no token stands for.
    """

    name: str
    grid: tuple[int, ...]
    prefix: int
    dense: int
    kept: int
    dense_macs: int
    pruned_macs: int
    background: str
    suffix: int = 0
    coarse: int = 0
    dropped: int = 0

    @property
    def fine(self) -> int:
        """Patches that are kept as they are."""
        return self.kept - self.prefix - self.suffix - self.coarse


@dataclass(frozen=True)
class Report:
    """What `transform` did to a model; `str()` is a table.

    Attributes:
        model: Class name of the model.
        mode: The operator that is pruned: "tokens" or "pixels".
        z: Keep ratio.
        sites: Where positions are dropped.
        left_alone: Residual branches that stay dense, each with the reason.
        dense_macs: Multiply-accumulates of the dense model per image.
        pruned_macs: The same of the rewritten model, without the proposal.
        proposal_macs: The same of the proposal; 0 at z=1, where it does not run.
        reduced: Where tokens are reduced after that: (block, tokens before, tokens after), all tokens counted.
        per_frame: Whether the proposal is a network of images, which sees each frame of a clip independently.
        fallback: Why tokens were not pruned although they come first; empty if they were, or if pixels were asked for.
        statistics: Mean and std of both networks' pixels, or for which they are unknown.
        narrowed: Where only rows are computed that are read later: the module, the rows in front of it, and those behind it.
        all_rows: Why all rows are computed, where they are.
        embedding: The convolution in whose place only the kept patches are embedded; empty if all are.
        all_patches: Why all patches are embedded, where they are.
        restored: Where tokens are put back in their places: the module that lays them out as their grid (of code outside
            modules, the node), and the grid; once per layout.
        restore: What dropped places hold there: "nearest", the nearest kept token, or "zero".
        fused: How many attentions that the model writes out are one call each.
        written_out: Why none is, where the proof refused that.
    """

    model: str
    mode: str
    z: float
    sites: tuple[SiteReport, ...]
    left_alone: tuple[str, ...]
    dense_macs: int
    pruned_macs: int
    proposal_macs: int
    reduced: tuple[tuple[str, int, int], ...]
    per_frame: bool
    fallback: str = ""
    statistics: str = ""
    narrowed: tuple[str, int, int] | None = None
    all_rows: str = ""
    embedding: str = ""
    all_patches: str = ""
    restored: tuple[tuple[str, tuple[int, ...]], ...] = ()
    restore: str = "nearest"
    fused: int = 0
    written_out: str = ""

    @property
    def total_macs(self) -> int:
        """Multiply-accumulates of rewritten model and proposal together."""
        return self.pruned_macs + self.proposal_macs

    def __str__(self) -> str:
        behind = any(s.suffix for s in self.sites)
        others = ["prefix", "suffix"] if behind else ["prefix"]
        headers = ["site", "grid", *others, "positions dense", "kept", "GMACs dense", "pruned", "background"]
        rows = [
            (
                s.name,
                "x".join(map(str, s.grid)),
                s.prefix,
                *([s.suffix] if behind else []),
                s.dense,
                s.kept,
                _giga(s.dense_macs),
                _giga(s.pruned_macs),
                s.background,
            )
            for s in self.sites
        ]
        sites = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
        counts = [self.dense_macs, self.pruned_macs, self.proposal_macs, self.total_macs]
        row = [*map(_giga, counts), f"{self.dense_macs / max(1, self.total_macs):.2f}"]
        macs = tabulate(
            [row], headers=["GMACs dense", "pruned", "proposal", "total", "ratio"], tablefmt="github", disable_numparse=True
        )
        left = "".join(f"\nleft alone: {reason}" for reason in self.left_alone)
        if self.total_macs > self.dense_macs:
            smaller = ", or a smaller z" if self.proposal_macs < self.dense_macs else ""
            left = f"\nmore work than the dense model: {_LIGHTER}{smaller}{left}"
        for site in self.sites:
            if site.background == "coarse":
                cells = f"{site.coarse} coarse tokens for a cell of 2 x 2 patches each, {site.dropped} cells dropped"
                left = f"\nbackground: {site.fine} fine patches, {cells}{left}"
        if self.reduced:
            (first, before, _), (last, _, after) = self.reduced[0], self.reduced[-1]
            left = f"\nreduced: {before} tokens to {after}, in {len(self.reduced)} blocks from `{first}` to `{last}`{left}"
        if self.narrowed:
            left = "\nnarrowed: in `{}` from {} rows to {}{}".format(*self.narrowed, left)
        elif self.all_rows:
            left = f"\nnot narrowed: {self.all_rows}{left}"
        if self.embedding:
            left = f"\nembedded: the kept patches only, in place of `{self.embedding}`{left}"
        elif self.all_patches and self.all_patches != self.all_rows:
            left = f"\nembedded: all patches, as {self.all_patches}{left}"
        if self.restored:
            (first, grid), more = self.restored[0], len(self.restored) - 1
            filled = "zero" if self.restore == "zero" else "their nearest kept token"
            where = f"`{first}`" + (f" and {more} more" if more else "")
            left = f"\nrestored: tokens to their grid {'x'.join(map(str, grid))} in {where}; dropped places hold {filled}{left}"
        if self.fused:
            left = f"\nfused: {self.fused} attentions that the model writes out are one call each{left}"
        elif self.written_out:
            left = f"\nnot fused: {self.written_out}{left}"
        if self.per_frame:
            left = f"\nproposal: a network of images, run on each frame independently{left}"
        if self.statistics:
            left = f"\nstatistics: {self.statistics}{left}"
        if self.fallback:
            left = f"\nnot by tokens: {self.fallback}{left}"
        return f"{self.model}: {self.mode}, z={self.z:g}\n{sites}\n\n{macs}{left}"


@shared_results()
def report(gm: fx.GraphModule) -> Report:
    """Counts what a transformed module does for one image of the traced size.

    Args:
        gm: A module returned by `transform`.

    Raises:
        ArgumentError: `gm` was not transformed.
    """
    module = checked_module(gm)
    plan, images, root = module.plan, module.example(), module.for_shapes()
    mode = plan.mode(module.training)
    rewritten = module.graph
    macs = _Macs(count_macs_by_node(root, mode.dense, images), count_macs_by_node(root, rewritten, images))
    proposal = sum(macs.pruned.pop(node.name, 0) for node in find_all(rewritten, Kind.MAP))
    if isinstance(mode, TokenPlan):
        sites, reasons = (_token_site(mode, plan.z, macs),), ()
    else:
        sites, reasons = _pixel_sites(mode, plan.z, macs), tuple(miss.reason for miss in mode.skipped)
    return Report(
        plan.name,
        plan.kind,
        plan.z,
        sites,
        reasons,
        sum(macs.dense.values()),
        sum(macs.pruned.values()),
        proposal,
        _reductions(module),
        module.papr_proposal.per_frame,
        plan.fallback,
        module.papr_proposal.statistics,
        *_left_out(module),
        restored=_restored(module),
        restore=plan.target.restore,
        fused=len(find_all(rewritten, Kind.FUSED)),
        written_out=plan.fusing.reason,
    )


@dataclass(frozen=True)
class _Macs:
    """Multiply-accumulates by node, dense and pruned."""

    dense: dict[str, int]
    pruned: dict[str, int]

    def of(self, names: Collection[str]) -> tuple[int, int]:
        """The sums over some nodes."""
        before, after = (sum(macs.get(name, 0) for name in names) for macs in (self.dense, self.pruned))
        return before, after


def _reductions(module: PrunedModule) -> tuple[tuple[str, int, int], ...]:
    mode = module.plan.mode(module.training)
    if not isinstance(mode, TokenPlan) or not mode.reduces:
        return ()
    counts = {node.name: shape[1] for node in module.graph.nodes if (shape := shape_of(node)) and len(shape) == 3}
    after = {number_of(node): node.name for node in find_all(module.graph, Kind.REDUCED)}
    return tuple(
        (site.block, counts[site.addition], counts[after[place]])
        for place, site in enumerate(mode.reduced.sites)
        if place in after  # none goes where a schedule says 0
    )


def _left_out(module: PrunedModule) -> tuple[tuple[str, int, int] | None, str, str, str]:
    mode = module.plan.mode(module.training)
    if not isinstance(mode, TokenPlan) or module.plan.z == 1:
        return None, "", "", ""
    found, node = mode.narrowing, mode.embedding.node
    embedding = str(nodes_by_name(mode.dense)[node].target) if node else "", mode.embedding.reason
    if not found.sites:
        return None, found.reason, *embedding
    first = find_all(module.graph, Kind.ROWS)[0]
    value, axis = cast(fx.Node, first.args[0]), cast(int, first.args[1])
    return (found.block, (shape_of(value) or ())[axis], found.rows), "", *embedding


def _restored(module: PrunedModule) -> tuple[tuple[str, tuple[int, ...]], ...]:
    mode = module.plan.mode(module.training)
    if not isinstance(mode, TokenPlan) or module.plan.z == 1:
        return ()
    nodes, grid = nodes_by_name(mode.dense), mode.site(mode.dense).rows.grid
    layouts = [nodes[site.layout] for site in mode.repairs.places]
    return tuple((next(reversed(layout.meta["inside"]), "") or layout.name, grid) for layout in layouts)


def _token_site(mode: TokenPlan, z: float, macs: _Macs) -> SiteReport:
    site = mode.site(mode.dense)
    before = ancestors(site.stream)
    after = [node.name for node in mode.dense.nodes if node not in before]
    rows = site.rows
    found = _site_report(f"{site.stream.name} -> {site.block}", rows, rows.kept(z, coarse=mode.coarse), macs.of(after), "")
    if not mode.coarse or z == 1:
        return found
    quads = quad_counts(rows.grid, keep_count(rows.cells, z, rows.others))
    dropped = prod(quad_grid(rows.grid)) - quads.fine - quads.coarse
    return replace(found, background="coarse", coarse=quads.coarse, dropped=dropped)


def _pixel_sites(mode: PixelPlan, z: float, macs: _Macs) -> tuple[SiteReport, ...]:
    return tuple(
        _site_report(site.name, site.rows, mode.kept_rows(site, z), macs.of(site.region), background)
        for site, background in zip(mode.sites, mode.backgrounds(), strict=True)
    )


def _site_report(name: str, rows: TokenRows, kept: int, macs: tuple[int, int], background: str) -> SiteReport:
    dropped = rows.count - kept
    return SiteReport(name, rows.grid, rows.prefix, rows.count, kept, *macs, background, rows.suffix, dropped=dropped)


def _giga(count: int) -> str:
    return f"{count / 1e9:.2f}"
