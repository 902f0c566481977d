"""Part 10, merging: tokens may become fewer from block to block."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..ops import TokenRows
from ..ops.reduction import Matching
from ..passes.kinds import Kind
from ..tracing.blocks import last_tokens
from ..tracing.graphs import nodes_by_name
from ..tracing.numerics import relative_error, tensors_of
from ..tracing.roles import find, find_all
from ..tracing.sources import GraphModule
from . import picks, sums
from .case import Case, ComparisonError


def check(case: Case) -> None:
    """Merges all tokens at the sites of the reduction, and compares with the dense graph that averages them there.

    A merged token that weights as much as its members stands for all of them. So the output, and the tokens after the last
    block, must be those of the dense graph in which, after the same additions, every token is replaced by the average of
    its group. The groups are those of the merged run, so ties do not matter. With one token in another group, results must
    differ. This is proved for merging in proportion to size; other reductions change the same graph at the same sites.

    Before, each call of the module that picks tokens is compared with its definition (see `picks`), and so is what becomes of
    them (see `sums`).

    Fault: an attention or a mean ignores sizes, or something counts tokens. The other parts do not find it: they are about
    the graph without a reduction.
    Example: a head that sums its tokens: the output is off by 0.27.
    Does nothing without a reduction.

    Raises:
        ComparisonError: The results differ, or do not depend on the groups.
    """
    additions = case.rewrite.reduced_additions
    if not additions:
        return
    picks.check(case)
    sums.check(case)
    (choice,), graph = case.rewrite.choices, case.dense.graph
    last = last_tokens(graph, nodes_by_name(graph)[choice.stream], case.rewrite.blocks).name
    *merged, matchings = case.run(_merging(case, additions, last), case.images)
    groups = _groups(cast("list[Matching]", matchings))
    averaged = _averaging(case.root, case.rewrite.dense_graph(), additions, last)
    found = _spread(merged, groups[-1], choice.rows)
    error = relative_error(found, case.run(averaged, case.images, *groups))
    if not error <= case.tolerance:
        raise ComparisonError(
            f"merging: the output is off by {error:.1e} (relative; {case.tolerance:.0e} is allowed) from that of the dense "
            "model in which merged tokens are averaged: something counts tokens, such as a pooling, or tells them apart"
        )
    moved = [group.clone() for group in groups]
    for group in moved:
        group[:, -1] = (group[:, -1] + 1) % (group.max() + 1)
    control = relative_error(found, case.run(averaged, case.images, *moved))
    if not control > max(case.tolerance / 10, 10 * error):
        raise ComparisonError(
            f"merging: with one token in another group, output and last tokens move by only {control:.1e}, so the proof "
            "would not see a fault. Pass verify=False if the model is right to ignore single tokens"
        )


def _merging(case: Case, additions: Sequence[str], last: str) -> fx.GraphModule:
    """The graph that merges. It also returns the tokens after the last block, and which tokens were merged."""
    graph = case.rewrite.merging_graph()
    reduced = find(graph, Kind.REDUCED, len(additions) - 1)
    tokens = reduced if last == additions[-1] else nodes_by_name(graph)[last]
    matches = tuple(find_all(graph, Kind.MATCH))
    graph.output_node().args = ((graph.output_node().args[0], tokens, matches),)
    return GraphModule(case.root, graph)


def _groups(matchings: list[Matching]) -> list[Tensor]:
    """For each reduction, the merged token that every token of the dense stream is part of by then, (B, N)."""
    groups: list[Tensor] = []
    for matching in matchings:
        stay, merged, into = matching
        new = torch.arange(stay.shape[1], device=stay.device).expand_as(stay)
        places = torch.empty((len(stay), stay.shape[1] + merged.shape[1]), dtype=torch.int64, device=stay.device)
        places = places.scatter(1, stay, new).scatter(1, merged, into)
        groups.append(places.gather(1, groups[-1]) if groups else places)
    return groups


def _averaging(root: nn.Module, graph: fx.Graph, additions: Sequence[str], last: str) -> fx.GraphModule:
    """The dense graph, in which results of `additions` are averaged over groups, further inputs. It returns `last` too."""
    nodes = nodes_by_name(graph)
    graph.output_node().args = ((graph.output_node().args[0], nodes[last]),)
    given = graph.find_nodes(op="placeholder")[0]
    for number, name in enumerate(additions):
        with graph.inserting_after(given):
            given = graph.placeholder(f"groups_{number}")
        with graph.inserting_after(nodes[name]):
            average = graph.call_function(_average, (nodes[name], given))
        nodes[name].replace_all_uses_with(average, delete_user_cb=partial(operator.is_not, average))
    return GraphModule(root, graph)


def _average(tokens: Tensor, groups: Tensor) -> Tensor:
    """Every token (B, N, C) replaced by the average of its group."""
    members = F.one_hot(groups).to(tokens.dtype)  # (B, N, groups)
    means = members.transpose(1, 2) @ tokens / members.sum(1).clamp(min=1).unsqueeze(-1)
    return members @ means


def _spread(output: Any, groups: Tensor, rows: TokenRows) -> list[Tensor]:
    """The tensors of outputs that still hold tokens, or only patches, with each merged one repeated for all of its group."""
    count = int(groups.max()) + 1

    def spread(tensor: Tensor) -> Tensor:
        for first, behind in rows.spans:  # the prefix tokens are the first groups, the suffix tokens the last
            if tensor.ndim == 3 and tensor.shape[1] == count - first - behind:
                places = (groups[:, first : groups.shape[1] - behind] - first).unsqueeze(-1)
                return tensor.gather(1, places.expand(-1, -1, tensor.shape[-1]))
        return tensor

    return [spread(tensor) for tensor in tensors_of(output)]
