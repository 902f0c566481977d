"""The proof that tokens may become fewer from block to block: on the model itself, with parameters at unit scale.

A merged token that weighs as much as its members stands for all of them: the output must be that of the dense graph in which,
behind the same additions, every token is replaced by the average of its group. Tokens are grouped as the merged run did, so
nothing hangs on ties. With one token put into another group it must not be, or the proof would see nothing.

Tokens behind the last block are compared as well as the output, which may not see all of them. This holds for merging in
proportion to size. Other reductions, and merging without it, change the same graph at the same sites by other functions; what
is proved for them is these sites.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..ops.reduction import Matching
from ..passes import prune_tokens
from ..passes.merge_tokens import Merge
from ..planning.plan import Plan, Tokens
from ..tracing.numerics import relative_error
from .case import TOLERANCES, ComparisonError, run


def prove_reduction(root: nn.Module, plan: Plan, values: dict[str, Tensor], images: Tensor, *, training: bool) -> None:
    """Proves the sites of the reduction in `plan`; does nothing without one.

    Args:
        root: The modules that its graphs call, in eval mode.
        plan: The plan.
        values: Parameters at unit scale.
        images: Random images.
        training: Which of the two graphs.

    Raises:
        VerifyError: They are not sound.
    """
    tokens = plan.operator
    if not isinstance(tokens, Tokens) or not tokens.reduction or not tokens.reduced[training].sites:
        return
    merge = Merge(max(1, tokens.reduction.r), tokens.reduction.blocks)
    whole = replace(plan, z=1.0, operator=replace(tokens, reduction=merge))
    additions = [site.addition for site in tokens.reduced[training].sites]
    dense = plan.dense_graph(training)
    site = prune_tokens.find_site(dense, tokens.blocks)
    last = prune_tokens.last_tokens(dense, site.stream, tokens.blocks).name
    graph = whole.rewrite(training)
    nodes = {node.name: node for node in graph.nodes}
    behind = nodes[f"papr_tokens_{len(additions) - 1}" if last == additions[-1] else last]
    matches = [node for name, node in nodes.items() if name.startswith("papr_match_")]
    graph.output_node().args = ((graph.output_node().args[0], behind, tuple(matches)),)
    *merged, matchings = run(fx.GraphModule(root, graph), values, images)
    groups = _groups(cast("list[Matching]", matchings))
    averaged = _averaging(root, dense, additions, last)
    found = _spread(merged, groups[-1], site.prefix)
    error = relative_error(found, run(averaged, values, images, *groups))
    if not error <= TOLERANCES[images.dtype]:
        raise ComparisonError(
            f"merging: the output is off by {error:.1e} (relative; {TOLERANCES[images.dtype]:.0e} is allowed) from that of the "
            "dense model in which merged tokens are averaged: something counts tokens, such as a pooling, or tells them apart"
        )
    moved = [group.clone() for group in groups]
    for group in moved:
        group[:, -1] = (group[:, -1] + 1) % (group.max() + 1)
    control = relative_error(found, run(averaged, values, images, *moved))
    if not control > max(TOLERANCES[images.dtype] / 10, 10 * error):
        raise ComparisonError(
            f"merging: with one token in another group, output and last tokens move by {control:.1e} only, so that the proof "
            "would not see a fault. Pass verify=False if the model is right to ignore single tokens"
        )


def _groups(matchings: list[Matching]) -> list[Tensor]:
    """For each reduction, the merged token that every token of the dense stream is in by then, (B, N)."""
    groups: list[Tensor] = []
    for matching in matchings:
        stay, merged, into = matching
        new = torch.arange(stay.shape[1], device=stay.device).expand_as(stay)
        places = torch.empty((len(stay), stay.shape[1] + merged.shape[1]), dtype=torch.int64, device=stay.device)
        places = places.scatter(1, stay, new).scatter(1, merged, into)
        groups.append(places.gather(1, groups[-1]) if groups else places)
    return groups


def _averaging(root: nn.Module, graph: fx.Graph, additions: list[str], last: str) -> fx.GraphModule:
    """The dense graph with groups as further inputs, by which results of `additions` are averaged; it returns `last` too."""
    nodes = {node.name: node for node in graph.nodes}
    graph.output_node().args = ((graph.output_node().args[0], nodes[last]),)
    given = graph.find_nodes(op="placeholder")[0]
    for number, name in enumerate(additions):
        with graph.inserting_after(given):
            given = graph.placeholder(f"groups_{number}")
        with graph.inserting_after(nodes[name]):
            average = graph.call_function(_average, (nodes[name], given))
        nodes[name].replace_all_uses_with(average, delete_user_cb=partial(operator.is_not, average))
    return fx.GraphModule(root, graph)


def _average(tokens: Tensor, groups: Tensor) -> Tensor:
    """Every token (B, N, C) replaced by the average of its group."""
    members = F.one_hot(groups).to(tokens.dtype)  # (B, N, groups)
    means = members.transpose(1, 2) @ tokens / members.sum(1).clamp(min=1).unsqueeze(-1)
    return members @ means


def _spread(output: Any, groups: Tensor, prefix: int) -> Any:
    """Outputs that still hold tokens, or patches alone, with each put in the place of all of its group."""
    count = int(groups.max()) + 1

    def spread(tensor: Tensor) -> Tensor:
        for without in (0, prefix):  # the prefix tokens are the first groups
            if tensor.ndim == 3 and tensor.shape[1] == count - without:
                places = (groups[:, without:] - without).unsqueeze(-1)
                return tensor.gather(1, places.expand(-1, -1, tensor.shape[-1]))
        return tensor

    return pytree.tree_map_only(Tensor, spread, output)
