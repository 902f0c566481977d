"""Prunes a token model: by the plan that leaves out rows nobody reads, or else by one that computes them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from torch import nn

from ..errors import NoSiteError, PaprError, TraceError
from ..proposals.network import SignificanceNet
from ..tracing.trunk import Trunk
from . import inputs
from .attentions import attentions_of_blocks, with_attentions
from .left_out import Attempt
from .modes import TokenOptions
from .module import PrunedModule
from .plan import Plan
from .reads import check_token_reads
from .token_planner import REFUSED, TokenPlanner


def prune_by_tokens(
    request: inputs.Request, trunk: Trunk, proposal: Callable[[], SignificanceNet], options: TokenOptions
) -> PrunedModule:
    """Builds the model that runs on fewer tokens. Not yet proved.

    Raises:
        NoSiteError: There is no token stream, or its blocks do not run on fewer tokens.
        TraceError: The model's forward cannot be recorded.
    """
    found = _Candidate(request, trunk, proposal, options)
    attentions: frozenset[str] = frozenset()
    if options.fuse and trunk.blocks and not trunk.spatial and options.merge is None:
        attentions = attentions_of_blocks(request, trunk.blocks)
    return with_attentions(request, attentions, found.pruned)


@dataclass(frozen=True)
class _Candidate:
    """What is to be pruned. See `prune_by_tokens`."""

    request: inputs.Request
    trunk: Trunk
    proposal: Callable[[], SignificanceNet]
    options: TokenOptions

    def pruned(self, attentions: frozenset[str]) -> PrunedModule:
        """The result, with those modules traced through for their attention."""
        reason = ""
        attempts = ((True, True), (True, False), (False, True))
        for rows, patches in attempts if self.options.narrow else ():
            attempt = Attempt(rows, patches, reason)
            try:
                gm = _pruned(TokenPlanner(self.request, self.trunk, self.options, attempt, attentions), self.proposal)
            except PaprError as error:
                if not attempt.opened and not attempt.found:
                    raise
                reason = str(error).splitlines()[0]  # it may be the model's own: then it is raised below
            else:
                if gm.plan.narrows or not attempt.opened:
                    return gm
                reason = attempt.reason or reason
        return _pruned(TokenPlanner(self.request, self.trunk, self.options, Attempt(whole=reason), attentions), self.proposal)


def _pruned(planner: TokenPlanner, proposal: Callable[[], SignificanceNet]) -> PrunedModule:
    root, plan, recorded = planner.plan()
    root.papr_proposal = network = proposal()
    gm = _built(root, plan.seeing(network).restoring(planner.options.restore))
    check_token_reads(gm, planner.blocks, recorded)
    return gm


def _built(root: nn.Module, plan: Plan) -> PrunedModule:
    try:
        return PrunedModule(root, plan)
    except TraceError as error:
        first = str(error).splitlines()[0]
        if plan.eval.reduces:
            with suppress(TraceError):  # if pruning alone fails too, merging is not the reason
                PrunedModule(root, plan.reducing(None))
                raise NoSiteError(f"merge: {plan.name} does not run on merged tokens: {first}") from error
        raise NoSiteError(f"{REFUSED.format(plan.name)}: {first}") from error
