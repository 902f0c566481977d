"""Which tokens a reduction picks, against the definitions of its papers; and what pixel operators leave behind."""

import pytest
import torch

import papr_fx
from papr_fx import ops, peers
from papr_fx.passes import prune_pixels
from papr_fx.proof import picks, regions
from papr_fx.proof.case import Case

from ..models import Shape, ToyViT, toy_proposal
from ..models.hierarchical import FAMILIES
from .parts import case_of, failures

REDUCTIONS = {
    "merged": papr_fx.Merge(2, "all"),
    "fused": peers.TokenFusion(2, linear_from=1),
    "attended": peers.AttentionPruning(2),
    "propagated": peers.TokenPropagation(2),
}


def of_other_keys(keys, *rest):
    return ops.match_tokens(keys.roll(1, 2), *rest)


def one_more(keys, r, *rest):
    return ops.match_tokens(keys, r + 1, *rest)


def other_partners(keys, *rest):
    stay, merged, into = ops.match_tokens(keys, *rest)
    return ops.Matching(stay, merged, into.roll(1, 1))


def most_attended_go(queries, keys, values, *rest):
    return ops.most_attended(-queries, keys, values, *rest)


def without_values(queries, keys, values, *rest):
    return ops.most_attended(queries, keys, torch.ones_like(values), *rest)


def without_sizes(queries, keys, sizes, *rest):
    return ops.choose_tokens(queries, keys, None if sizes is None else sizes.flip(1) ** 4, *rest)


def further_apart(keys, places, grid, *rest):
    return ops.neighbour_graph(keys, places, (1, 16), *rest)


FAULTS = [
    ("merged", ops.match_tokens, of_other_keys),
    ("merged", ops.match_tokens, one_more),
    ("fused", ops.match_tokens, other_partners),
    ("attended", ops.most_attended, most_attended_go),
    ("attended", ops.most_attended, without_values),
    ("propagated", ops.choose_tokens, without_sizes),
    ("propagated", ops.neighbour_graph, further_apart),
]


def reduced(name: str) -> Case:
    shape = Shape(depth=3, prefix=1, pool="cls")
    gm = papr_fx.transform(ToyViT(shape).eval(), toy_proposal(), 0.9, merge=REDUCTIONS[name], verify=False)
    return Case.of(ToyViT(shape).eval(), gm, torch.float64)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_right_picks_pass(name):
    picks.check(reduced(name))


@pytest.mark.parametrize(("name", "right", "wrong"), FAULTS, ids=[wrong.__name__ for *_, wrong in FAULTS])
def test_other_picks(name, right, wrong, monkeypatch):
    case = reduced(name)
    (graph,) = case.own.values()
    graph.find_nodes(op="call_function", target=right)[-1].target = wrong
    monkeypatch.setitem(picks._PICKS, wrong, picks._PICKS[right])
    monkeypatch.setitem(picks._READS, wrong, picks._READS[right])
    with pytest.raises(papr_fx.VerifyError, match="merging: `papr_.*` picks other tokens"):
        picks.check(case)


def test_tokens_that_are_matched_by_something_else_than_keys():
    case = reduced("merged")
    (graph,) = case.own.values()
    match = graph.find_nodes(op="call_function", target=ops.match_tokens)[0]
    (attention,) = [user for user in match.args[0].users if "scaled_dot" in user.name]
    match.args = (attention.args[2], *match.args[1:])
    with pytest.raises(papr_fx.VerifyError, match="which no attention has"):
        picks.check(case)


def test_backgrounds(monkeypatch):
    family = FAMILIES["ConvNeXt"]
    options = {"example_input": torch.zeros(1, 3, 64, 64)}
    assert not failures(case_of(family.model(), **options))
    monkeypatch.setattr(prune_pixels, "background_of", lambda site, background, training: "zero")
    with pytest.raises(papr_fx.VerifyError, match="in training mode, and is 'zero' in the graph"):
        regions.check(case_of(family.model(), **options))
    monkeypatch.setattr(prune_pixels, "background_of", lambda site, background, training: "keep")
    with pytest.raises(papr_fx.VerifyError, match="regions: what `.*` drops is to be 'zero'"):
        regions.check(case_of(family.model(), **options))
