"""What becomes of merged and dropped tokens, against the definitions of the papers."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import papr_fx
from papr_fx import ops, peers
from papr_fx.passes.schedules import Start, Work, left_after, spread_amounts
from papr_fx.proof import sums
from papr_fx.proof.case import Case

from ..models import Attention, Block, Shape, ToyViT, enliven, toy_proposal
from ..models.traps import Behind

REDUCTIONS = {
    "merged": papr_fx.Merge(2, "all"),
    "merged by a list": papr_fx.Merge([1, 0, 2], "all"),
    "merged late": papr_fx.Merge(2, "all", schedule="late"),
    "merged, not in proportion": papr_fx.Merge(2, "all", proportional=False),
    "fused": peers.TokenFusion(2, linear_from=1),
    "attended": peers.AttentionPruning(2),
    "propagated": peers.TokenPropagation(2),
}


def reduced(name: str, pool: str = "avg", z: float = 0.9) -> Case:
    model = ToyViT(Shape(depth=3, pool=pool)).eval()
    gm = papr_fx.transform(model, toy_proposal(), z, merge=REDUCTIONS[name], verify=False)
    return Case.of(model, gm, torch.float64)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("z", [0.8, 1])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_right_sums_pass(name, z):
    sums.check(reduced(name, "cls" if name == "attended" else "avg", z))


@pytest.mark.parametrize("reduction", [papr_fx.Merge(2, "all"), peers.TokenPropagation(2)])
def test_tokens_behind_the_patches(reduction):
    model = Behind()
    model.blocks = nn.ModuleList(Block(8, Attention(8, 2, True)) for _ in range(2))
    gm = papr_fx.transform(model.eval(), toy_proposal(), 0.9, merge=reduction, verify=False)
    sums.check(Case.of(model, gm, torch.float64))
    case = Case.of(model, gm, torch.float64)
    for node in case.own[False].nodes:
        if node.target in (ops.match_tokens, ops.choose_tokens):
            node.update_arg(len(node.args) - 1, 1)  # the suffix
    with pytest.raises(papr_fx.VerifyError, match="is given suffix 1, not 2"):
        sums.check(case)


def test_coarse_tokens_are_merged_too():
    model = ToyViT(Shape(image=(12, 18), depth=3)).eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.7, merge=papr_fx.Merge(2, "all"), background="coarse", verify=False)
    sums.check(Case.of(model, gm, torch.float64))


@pytest.mark.parametrize("schedule", ["constant", "late", "share"])
def test_half_of_the_patches_go_at_most(schedule):
    model = ToyViT(Shape(depth=3)).eval()
    reduction = papr_fx.Merge(7, "all", schedule=schedule)
    gm = papr_fx.transform(model, toy_proposal(), 0.55, merge=reduction, verify=False)
    sums.check(Case.of(model, gm, torch.float64))


def unweighted(tokens, sizes, matching):
    return ops.merge_tokens(tokens, None if sizes is None else torch.ones_like(sizes), matching)


def of_mean_length(tokens, sizes, matching):
    means, found = ops.merge_tokens(tokens, sizes, matching)
    return F.normalize(means, dim=-1) * tokens.norm(dim=-1).gather(1, matching[0]).unsqueeze(-1), found


def lost_sizes(tokens, sizes, chosen, weights, strength):
    return ops.propagate_tokens(tokens, sizes, chosen, weights, strength)[0], torch.ones_like(chosen[0], dtype=tokens.dtype)


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("merged", ops.merge_tokens, unweighted),
        ("fused", ops.fuse_tokens, of_mean_length),
        ("propagated", ops.propagate_tokens, lost_sizes),
    ],
)
def test_other_sums(name, right, wrong, monkeypatch):
    case = reduced(name)
    case.own[False].find_nodes(op="call_function", target=right)[-1].target = wrong
    monkeypatch.setitem(sums._SUMS, wrong, sums._SUMS[right])
    with pytest.raises(papr_fx.VerifyError, match="gives other tokens than"):
        sums.check(case)


def changed(case, target, place, value, number=-1):
    """Gives the call of a function another argument."""
    node = case.own[False].find_nodes(op="call_function", target=target)[number]
    node.update_arg(place, value(node) if callable(value) else value)


def first_sizes(node):
    return next(other for other in node.graph.nodes if other.name.startswith("papr_sizes"))


FAULTS = [
    ("merged", ops.match_tokens, 1, 1, "removes 1 of .* patches, not 2"),
    ("merged by a list", ops.match_tokens, 1, 1, "removes 1 of .* patches, not 2"),
    ("merged", ops.match_tokens, 2, 0, "is given prefix 0, not 1"),
    ("merged", ops.merge_tokens, 1, None, "is given other sizes"),
    ("merged", ops.size_bias, 0, first_sizes, "is given other sizes"),
    ("merged", ops.mean_by_size, 2, first_sizes, "is given other sizes"),
    ("fused", ops.fuse_tokens, 1, None, "is given other sizes"),
    ("propagated", ops.propagate_tokens, 4, 0.0, "is given strength 0.0, not 0.2"),
    ("propagated", ops.neighbour_graph, 4, 1, "is given edges 1, not 8"),
    ("propagated", ops.neighbour_graph, 2, (2, 8), "is given grid"),
    ("propagated", ops.neighbour_graph, 1, None, "takes tokens for others in the image"),
    ("propagated", ops.choose_tokens, 2, None, "is given other sizes"),
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("name", "target", "place", "value", "said"), FAULTS)
def test_other_arguments(name, target, place, value, said):
    case = reduced(name)
    changed(case, target, place, value)
    with pytest.raises(papr_fx.VerifyError, match=said):
        sums.check(case)


def test_attention_that_ignores_sizes():
    case = reduced("merged")
    graph = case.own[False]
    bias = graph.find_nodes(op="call_function", target=ops.size_bias)[-1]
    (attention,) = (user for user in bias.users if user.target is F.scaled_dot_product_attention)
    attention.kwargs = {name: value for name, value in attention.kwargs.items() if value is not bias}
    graph.erase_node(bias)
    with pytest.raises(papr_fx.VerifyError, match="does not weigh tokens"):
        sums.check(case)


ALL = {"r": 2, "blocks": "all"}
OTHERS = [
    (papr_fx.Merge(**ALL), papr_fx.Merge(**ALL, proportional=False), "and proportional=False"),
    (papr_fx.Merge(**ALL, proportional=False), papr_fx.Merge(**ALL), "does not weigh tokens"),
    (papr_fx.Merge([1, 0, 1], "all"), papr_fx.Merge([1, 1, 1], "all"), "at the sites"),
    (papr_fx.Merge(2, "all", schedule="late"), papr_fx.Merge(2, "all", schedule="share"), "not the schedule 'share'"),
    (papr_fx.Merge(2, "all"), papr_fx.Merge(2, "all", schedule="late"), "not the schedule 'late'"),
    (papr_fx.Merge([3, 2, 1], "all"), papr_fx.Merge(2, "all", schedule="late"), "not the schedule 'late'"),
    (peers.TokenFusion(2, linear_from=1), peers.TokenFusion(2, linear_from=2), "merges what is to be dropped"),
    (peers.TokenFusion(2, linear_from=3), peers.TokenFusion(2, linear_from=2), "is dropped, not merged"),
]


@pytest.mark.parametrize(("done", "asked", "said"), OTHERS)
def test_another_reduction_than_asked_for(done, asked, said):
    model = ToyViT(Shape(depth=3)).eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.9, merge=done, verify=False)
    case = Case.of(model, gm, torch.float64)
    case = replace(case, rewrite=replace(case.rewrite, plan=case.rewrite.plan.reducing(asked)))
    with pytest.raises(papr_fx.VerifyError, match=said):
        sums.check(case)


@pytest.mark.parametrize(
    ("blocks", "right", "wrong"),
    [("all", [0, 1, 2, 3, 4], [0, 1, 2, 3]), ("second-half", [2, 3, 4], [0, 1, 2]), ([0, -1], [0, 4], [0, 3])],
)
def test_other_blocks(blocks, right, wrong):
    names = [f"blocks.{number}" for number in range(5)]
    sums._check_blocks([names[number] for number in right], names, papr_fx.Merge(2, blocks))
    with pytest.raises(papr_fx.VerifyError, match="and blocks="):
        sums._check_blocks([names[number] for number in wrong], names, papr_fx.Merge(2, blocks))


class Deciding(ToyViT):
    """Asks its tokens by queries of its own, which attend to each other first."""

    def __init__(self):
        super().__init__(Shape(depth=3))
        self.queries = nn.Parameter(torch.randn(1, 3, 8))

    def classify(self, x):
        queries, tokens = self.queries.expand(x.shape[0], -1, -1).unsqueeze(1), self.norm(x).unsqueeze(1)
        asked = F.scaled_dot_product_attention(queries, queries, queries)
        return self.head(F.scaled_dot_product_attention(asked, tokens, tokens).squeeze(1).mean(1))


@pytest.mark.parametrize("name", ["merged", "fused", "propagated"])
def test_attention_of_others_than_tokens(name):
    model = enliven(Deciding()).eval()
    papr_fx.transform(model, toy_proposal(), 0.9, merge=REDUCTIONS[name])


@given(
    st.sampled_from(["late", "share"]),
    st.integers(1, 40),
    st.integers(1, 300),
    st.lists(st.builds(Work, st.floats(1, 1e4), st.floats(0, 50)), min_size=1, max_size=24),
)
def test_every_schedule_passes(schedule, r, patches, work):
    amounts = spread_amounts(schedule, r, Start(patches, 1), work)
    before = [patches, *left_after(amounts, patches)]
    removed = {place: (amount, before[place]) for place, amount in enumerate(amounts) if amount}
    run = SimpleNamespace(reduction=SimpleNamespace(schedule=schedule), removed=removed)
    assert sums._Follower._is_spread(run, len(work))
