"""What a rewrite did: sites, tokens and multiply-accumulates."""

from __future__ import annotations

from dataclasses import dataclass

from tabulate import tabulate
from torch import fx

from .macs import count_macs
from .module import checked_module
from .ops import keep_count
from .passes import prune_tokens
from .passes.splice_proposal import PROPOSAL


@dataclass(frozen=True)
class SiteReport:
    """One place where positions are dropped.

    Attributes:
        name: The node whose positions are gathered, and the module it feeds.
        grid: Rows and columns.
        prefix: Tokens beside the grid, always kept.
        dense: Tokens before, the prefix included.
        kept: Tokens after, the prefix included.
    """

    name: str
    grid: tuple[int, ...]
    prefix: int
    dense: int
    kept: int


@dataclass(frozen=True)
class Report:
    """What `transform` did to a model; `str()` is a table.

    Attributes:
        model: Class name of the model.
        mode: The operator that is pruned.
        z: Keep ratio.
        sites: Where positions are dropped.
        dense_macs: Multiply-accumulates of the dense model for one image.
        pruned_macs: The same of the rewritten model, the proposal left out.
        proposal_macs: The same of the proposal, 0 at z=1, where it does not run.
    """

    model: str
    mode: str
    z: float
    sites: tuple[SiteReport, ...]
    dense_macs: int
    pruned_macs: int
    proposal_macs: int

    @property
    def total_macs(self) -> int:
        """Multiply-accumulates of rewritten model and proposal together."""
        return self.pruned_macs + self.proposal_macs

    def __str__(self) -> str:
        rows = [(s.name, "x".join(map(str, s.grid)), s.prefix, s.dense, s.kept) for s in self.sites]
        sites = tabulate(rows, headers=["site", "grid", "prefix", "tokens dense", "tokens kept"], tablefmt="github")
        counts = [self.dense_macs, self.pruned_macs, self.proposal_macs, self.total_macs]
        row = [f"{count / 1e9:.2f}" for count in counts] + [f"{self.dense_macs / max(1, self.total_macs):.2f}"]
        macs = tabulate(
            [row], headers=["GMACs dense", "pruned", "proposal", "total", "ratio"], tablefmt="github", disable_numparse=True
        )
        return f"{self.model}: {self.mode}, z={self.z:g}\n{sites}\n\n{macs}"


def report(gm: fx.GraphModule) -> Report:
    """Counts what a transformed module does for one image of the traced size.

    Args:
        gm: A module returned by `transform`.

    Raises:
        ArgumentError: `gm` was not transformed.
    """
    module = checked_module(gm)
    plan, images = module.plan, module.example()
    site = prune_tokens.find_site(plan.dense_graph(module.training), plan.blocks)
    n = site.grid[0] * site.grid[1]
    kept = site.prefix + (keep_count(n, plan.z, site.prefix) if plan.z < 1 else n)
    sites = (SiteReport(f"{site.stream.name} -> {site.block.target}", site.grid, site.prefix, site.prefix + n, kept),)
    root = module.for_shapes()
    dense = count_macs(fx.GraphModule(root, plan.dense_graph(module.training)), images)
    if plan.z == 1:
        return Report(plan.name, "tokens", plan.z, sites, dense, dense, 0)
    proposal = count_macs(root.get_submodule(PROPOSAL), images)
    pruned = count_macs(fx.GraphModule(root, plan.rewrite(module.training)), images)
    return Report(plan.name, "tokens", plan.z, sites, dense, pruned - proposal, proposal)
