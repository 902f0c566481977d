"""What a rewrite did: sites, tokens and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from tabulate import tabulate
from torch import fx

from ..ops.positions import keep_count
from ..passes import prune_pixels, prune_tokens
from ..planning.module import PrunedModule, checked_module
from ..planning.plan import Pixels, Plan, Tokens
from ..tracing.graphs import ancestors, shape_of
from ..tracing.macs import count_macs_by_node


@dataclass(frozen=True)
class SiteReport:
    """One place where positions are dropped.

    Attributes:
        name: For tokens, the node whose positions are gathered and the module it feeds; for pixels, the operator's last layer.
        grid: Rows and columns, of clips (frames, rows, columns).
        prefix: Tokens beside the grid, always kept.
        dense: Positions before, the prefix included.
        kept: Positions after, the prefix included.
        dense_macs: Multiply-accumulates, for one image, of what runs on these positions alone: a pixel operator, or all that
            follows the tokens.
        pruned_macs: The same after pruning.
        background: What stands at dropped positions: "keep" (the residual), "zero", or nothing for tokens.
    """

    name: str
    grid: tuple[int, ...]
    prefix: int
    dense: int
    kept: int
    dense_macs: int
    pruned_macs: int
    background: str


@dataclass(frozen=True)
class Report:
    """What `transform` did to a model; `str()` is a table.

    Attributes:
        model: Class name of the model.
        mode: The operator that is pruned: "tokens" or "pixels".
        z: Keep ratio.
        sites: Where positions are dropped.
        left_alone: Residual branches that stay dense, each with the reason.
        dense_macs: Multiply-accumulates of the dense model for one image.
        pruned_macs: The same of the rewritten model, the proposal left out.
        proposal_macs: The same of the proposal, 0 at z=1, where it does not run.
        reduced: Where tokens become fewer behind that: (block, tokens before, tokens behind), prefix tokens included.
        per_frame: Whether the proposal is a network of images, which sees each frame of a clip alone.
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

    @property
    def total_macs(self) -> int:
        """Multiply-accumulates of rewritten model and proposal together."""
        return self.pruned_macs + self.proposal_macs

    def __str__(self) -> str:
        headers = ["site", "grid", "prefix", "positions dense", "kept", "GMACs dense", "pruned", "background"]
        rows = [
            (
                s.name,
                "x".join(map(str, s.grid)),
                s.prefix,
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
        if self.reduced:
            (first, before, _), (last, _, behind) = self.reduced[0], self.reduced[-1]
            left = f"\nreduced: {before} tokens to {behind}, in {len(self.reduced)} blocks from `{first}` to `{last}`{left}"
        if self.per_frame:
            left = f"\nproposal: a network of images, run on each frame alone{left}"
        return f"{self.model}: {self.mode}, z={self.z:g}\n{sites}\n\n{macs}{left}"


def report(gm: fx.GraphModule) -> Report:
    """Counts what a transformed module does for one image of the traced size.

    Args:
        gm: A module returned by `transform`.

    Raises:
        ArgumentError: `gm` was not transformed.
    """
    module = checked_module(gm)
    plan, images, root = module.plan, module.example(), module.for_shapes()
    dense = count_macs_by_node(root, plan.dense_graph(module.training), images)
    pruned = count_macs_by_node(root, plan.rewrite(module.training), images)
    proposal = pruned.pop("papr_map", 0)
    if isinstance(plan.operator, Tokens):
        sites, reasons = _token_sites(plan, plan.operator, module.training, dense, pruned), ()
    else:
        sites = _pixel_sites(plan, plan.operator, module.training, dense, pruned)
        reasons = tuple(miss.reason for miss in plan.operator.left[module.training])
    macs = sum(dense.values()), sum(pruned.values()), proposal
    reduced = _reductions(module)
    return Report(plan.name, plan.operator.mode, plan.z, sites, reasons, *macs, reduced, module.papr_proposal.per_frame)


def _reductions(module: PrunedModule) -> tuple[tuple[str, int, int], ...]:
    operator = module.plan.operator
    if not isinstance(operator, Tokens) or not operator.reduction or not operator.reduction.r:
        return ()
    counts = {node.name: shape[1] for node in module.graph.nodes if (shape := shape_of(node)) and len(shape) == 3}
    sites = operator.reduced[module.training].sites
    return tuple((site.block, counts[site.addition], counts[f"papr_tokens_{i}"]) for i, site in enumerate(sites))


def _token_sites(
    plan: Plan, operator: Tokens, training: bool, dense: Mapping[str, int], pruned: Mapping[str, int]
) -> tuple[SiteReport, ...]:
    site = prune_tokens.find_site(plan.dense_graph(training), operator.blocks)
    n = prod(site.grid)
    kept = site.prefix + _kept(plan, n, site.prefix)
    before = ancestors(site.stream)
    after = [node.name for node in site.stream.graph.nodes if node not in before]
    before_macs, after_macs = (sum(macs.get(name, 0) for name in after) for macs in (dense, pruned))
    name = f"{site.stream.name} -> {site.block}"
    return (SiteReport(name, site.grid, site.prefix, site.prefix + n, kept, before_macs, after_macs, ""),)


def _pixel_sites(
    plan: Plan, operator: Pixels, training: bool, dense: Mapping[str, int], pruned: Mapping[str, int]
) -> tuple[SiteReport, ...]:
    sites: list[SiteReport] = []
    for site in operator.sites[training]:
        n = prod(site.grid)
        before, after = (sum(macs[name] for name in site.region) for macs in (dense, pruned))
        background = prune_pixels.background_of(site, operator.background, training)
        kept = site.prefix + _kept(plan, n, 0)
        sites.append(SiteReport(site.name, site.grid, site.prefix, site.prefix + n, kept, before, after, background))
    return tuple(sites)


def _kept(plan: Plan, positions: int, prefix: int) -> int:
    return keep_count(positions, plan.z, prefix) if plan.z < 1 else positions


def _giga(count: int) -> str:
    return f"{count / 1e9:.2f}"
