"""What pruned models are compared with: a plain transcription of PaPr, token merging, and its peers.

`TokenFusion`, `TokenPropagation` and `AttentionPruning` are values of `transform(..., merge=...)`, as `Merge` is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, fx

from . import ops
from .errors import ArgumentError
from .passes.attend_tokens import AttentionPruning
from .passes.fuse_tokens import TokenFusion
from .passes.kinds import Kind
from .passes.merge_tokens import Merge
from .passes.propagate_tokens import TokenPropagation
from .passes.reduction import Reduction
from .passes.schedules import SCHEDULES, Schedule
from .planning.module import PrunedModule, shell, sibling
from .tracing.macs import count_macs_by_node
from .tracing.results import shared_results
from .tracing.roles import has_role
from .tracing.sources import GraphModule

__all__ = ["AttentionPruning", "TokenFusion", "TokenPropagation", "at_macs", "kept_before", "reduction_named", "transcribed"]

# Reductions by their names in benchmarks. Each acts in every block; after pruning, in the second half of the blocks.
_REDUCTIONS: dict[str, Reduction] = {
    "tome": Merge(blocks="all"),
    "tofu": TokenFusion(),
    "gtp": TokenPropagation(),
    "ats": AttentionPruning(),
}
_NAMES = (*_REDUCTIONS, *(f"papr+{name}" for name in _REDUCTIONS))
REDUCERS = ("papr", *_NAMES, *(f"{name}:{schedule}" for schedule in SCHEDULES[1:] for name in _NAMES))


def transcribed(gm: PrunedModule) -> fx.GraphModule:
    """The same model with PaPr as a paper's code would write it: `gather` with an expanded index; zeros, a scatter and a sum.

    The proposal is still fused, but images are not put into channels-last memory.
    """
    graph = copy.deepcopy(gm.graph)
    plain = {ops.gather_tokens: _gather_tokens, ops.gather_pixels: _gather_pixels, ops.write_pixels: _write_pixels}
    for node in graph.nodes:
        node.target = plain.get(node.target, node.target)
        if has_role(node, Kind.CHANNELS_LAST):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
    return GraphModule(shell(gm), graph)


def _gather_tokens(tokens: Tensor, keep: Tensor) -> Tensor:
    return tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _channels_last(x: Tensor, channels: int) -> Tensor:
    """Values whose channels are in axis `channels`, as (B, n, C)."""
    return x.movedim(channels, -1).flatten(1, -2)


def _index(rows: Tensor, like: Tensor) -> Tensor:
    """Rows (B * k,) of the batch as indices (B, k, C) into the positions of each sample of `like` (B, n, C)."""
    keep = rows.view(like.shape[0], -1) % like.shape[1]
    return keep.unsqueeze(-1).expand(-1, -1, like.shape[2])


def _gather_pixels(x: Tensor, rows: Tensor, grid: Sequence[int], layout: str) -> Tensor:
    channels = layout.index("C")
    positions = _channels_last(x, channels)
    kept = positions.gather(1, _index(rows, positions))  # (B, k, C)
    return (kept.unsqueeze(2) if x.ndim == 4 else kept).movedim(-1, channels)


def _write_pixels(residual: Tensor, branch: Tensor, rows: Tensor, layout: str, background: str) -> Tensor:
    channels = layout.index("C")
    dense, kept = _channels_last(residual, channels), _channels_last(branch, channels)
    index = _index(rows, dense)
    padded = torch.zeros_like(dense).scatter(1, index, kept.to(dense.dtype))
    passed = dense if background == "keep" else torch.zeros_like(dense).scatter(1, index, dense.gather(1, index))
    return (passed + padded).view(residual.movedim(channels, -1).shape).movedim(-1, channels)


def reduction_named(name: str) -> Reduction:
    """The reduction of a name of `REDUCERS`, such as "tome", "tome:late" or "papr+tome".

    After PaPr, it acts in the second half of the blocks. Behind the colon is its schedule.
    """
    pruning, _, peer = name.rpartition("+")
    peer, colon, schedule = peer.partition(":")
    given = replace(_REDUCTIONS[peer], schedule=cast(Schedule, schedule)) if colon else _REDUCTIONS[peer]
    return replace(given, blocks="second-half") if pruning else given


def kept_before(z: float) -> float:
    """The keep ratio to combine with merging, for about the cost of pruning alone at z: the paper takes 0.55 for 0.5."""
    return min(1.0, z + 0.05)


@shared_results()
def at_macs(gm: PrunedModule, macs: int) -> PrunedModule:
    """The same module with the reduction's r chosen so that its MACs, the proposal included, are nearest to `macs`.

    Raises:
        ArgumentError: It has no reduction with one r.
    """
    given = gm.plan.reduction
    if given is None or not isinstance(given.r, int):
        raise ArgumentError(f"at_macs chooses the one r of a reduction, such as merge=papr_fx.Merge(r=8), not of {given}")
    tried: dict[int, tuple[int, PrunedModule]] = {}  # by r

    def macs_with(r: int) -> int:
        if r in tried:
            return tried[r][0]
        changed = sibling(gm, reduction=replace(given, r=r))
        count = sum(count_macs_by_node(changed.for_shapes(), changed.graph, changed.example()).values())
        tried[r] = count, changed
        return count

    low, high = 0, 8
    while macs_with(high) > macs and high < 1 << 10:
        low, high = high, 2 * high
    turn = 0
    while high - low > 1:
        most, least = macs_with(low), macs_with(high)
        on_a_line = low + round((high - low) * (most - macs) / max(1, most - least))
        # MACs are nearly linear in r: the guess is right or next to it, on either side. Else the middle is tried.
        guess = (on_a_line, on_a_line - 1, on_a_line + 1, (low + high) // 2)[turn % 4]
        middle = min(max(guess, low + 1), high - 1)
        low, high = (middle, high) if macs_with(middle) > macs else (low, middle)
        turn += 1
    return min(tried.values(), key=lambda pair: abs(pair[0] - macs))[1]
