"""Schedules of reductions: a number for each block, and more in late blocks for the same multiply-accumulates."""

import copy
import math
import pickle
from itertools import pairwise

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import papr_fx
from papr_fx import peers
from papr_fx.passes.schedules import Start, Work, spread_amounts

from .. import reducers
from ..models import Shape, ToyViT, images, toy_proposal
from .test_reduction import DEPTH, MODELS, agree, eval_toy
from .test_reduction_forms import Summed

BLOCKS = {"all": (0, 1, 2, 3), "second-half": (2, 3), (0, -1): (0, 3), (1, 2, 3): (1, 2, 3)}


@st.composite
def listed(draw):
    """Blocks, and a number for each of them: half of the patches that are left there at most."""
    blocks = draw(st.sampled_from([*BLOCKS]))
    left, numbers = 20, []
    for _ in BLOCKS[blocks]:
        numbers.append(draw(st.integers(0, left // 2)))
        left -= numbers[-1]
    return blocks, numbers


@hypothesis.given(listed(), st.sampled_from([0, 1, 2]), st.sampled_from(["avg", "patches"]), st.booleans())
@hypothesis.settings(max_examples=4, deadline=None)
@torch.no_grad()
def test_a_number_for_each_block_against_a_transcription(case, prefix, pool, proportional):
    blocks, numbers = case
    model = eval_toy(image=(8, 15), prefix=prefix, pool=pool)  # 20 patches
    gm = papr_fx.transform(model, toy_proposal(), 1, merge=papr_fx.Merge(numbers, blocks, proportional), verify=False)
    reduce = in_turn(lambda r: reducers.merging(r, prefix), numbers)
    agree(model, gm, reducers.Eager(reduce, BLOCKS[blocks], proportional))


def in_turn(reducer, numbers):
    """A reducer that takes the number of its block."""
    return lambda tokens, attended: reducer(numbers[attended.number])(tokens, attended)


NUMBERS = (1, 0, 4, 3)
PEERS = {
    "fusion": (peers.TokenFusion(NUMBERS, linear_from=2), lambda r, grid: reducers.fusion(r, 1, 2)),
    "attention": (peers.AttentionPruning(NUMBERS), lambda r, grid: reducers.attention_pruning(r, 1)),
    "propagation": (
        peers.TokenPropagation(NUMBERS, strength=0.7, edges=2),
        lambda r, grid: reducers.propagation(r, 1, grid, 0.7, 2),
    ),
}


@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_peers_take_a_number_for_each_block(name):
    """`linear_from` counts a block that removes nothing too."""
    reduction, reducer = PEERS[name]
    model = eval_toy(image=(8, 15))
    gm = papr_fx.transform(model, toy_proposal(), 0.8, merge=reduction, verify=False)
    agree(model, gm, reducers.Eager(in_turn(lambda r: reducer(r, model.shape.grid), NUMBERS), range(DEPTH)))


def plain_total(amounts, patches, others, work):
    """Multiply-accumulates, written out."""
    total = 0.0
    for amount, (per_token, per_pair) in zip(amounts, work, strict=True):
        patches -= min(amount, patches // 2)
        total += (patches + others) * (per_token + per_pair * (patches + others))
    return total


def scaled(schedule, scale, patches, count):
    """What `count` blocks remove, in either schedule."""
    found = []
    for place in range(1, count + 1):
        wanted = scale * place**2 if schedule == "late" else scale * patches
        found.append(min(round(wanted), patches // 2))
        patches -= found[-1]
    return tuple(found)


@hypothesis.given(
    r=st.integers(0, 30),
    patches=st.integers(1, 40),
    others=st.integers(0, 3),
    work=st.lists(st.builds(Work, st.floats(1, 50), st.floats(0, 0.3)), min_size=1, max_size=7),
)
@hypothesis.example(r=5, patches=33, others=0, work=[Work(1.0, 0.0)] * 3)  # at 1/6, 33 s is 5.5 and 27 s is 4.5
@pytest.mark.parametrize("schedule", ["late", "share"])
@hypothesis.settings(max_examples=40, deadline=None)
def test_the_work_is_the_nearest_of_all_scales(schedule, r, patches, others, work):
    """Of all that rounding makes of s * 1, s * 4, s * 9, ..., or of s * n; s lies between any two places where it changes.

    At such a place itself, one amount may have changed and another not yet.
    """
    factors = [i**2 for i in range(1, len(work) + 1)] if schedule == "late" else range(1, patches + 1)
    edges = sorted({0.0, *((m + 0.5) / factor for factor in factors for m in range(patches))})
    scales = [0.0, *((a + b) / 2 for a, b in pairwise(edges)), edges[-1] + 1]
    at_edges = [near for edge in edges for near in (math.nextafter(edge, 0), edge, math.nextafter(edge, 2 * edge + 1))]
    goal = plain_total([r] * len(work), patches, others, work)
    tried = {scaled(schedule, s, patches, len(work)) for s in scales}
    best = min(abs(plain_total(amounts, patches, others, work) - goal) for amounts in tried)
    found = spread_amounts(schedule, r, Start(patches, others), work)
    assert found in tried | {scaled(schedule, s, patches, len(work)) for s in at_edges}
    assert abs(plain_total(found, patches, others, work) - goal) <= best + 1e-9 * goal


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("make", "width", "hidden"),
    [
        (lambda: ToyViT(Shape(), width=16).eval(), 16, 32),
        (MODELS["torchvision"], 32, 48),
        (MODELS["attention pooling"], 32, 128),
    ],
    ids=["kernel", "module", "attention pooling"],
)
def test_the_work_that_follows_on_each_block(make, width, hidden):
    """An MLP, and the next block's attention: four projections of each token, two products of each pair of tokens."""
    gm = papr_fx.transform(make(), toy_proposal(), 1, merge=papr_fx.Merge(1, "all"), verify=False)
    *inner, last = gm.plan.eval.reduced.work
    assert inner
    for work in inner:
        assert work == pytest.approx((2 * width * hidden + 4 * width**2, 2 * width))
    assert last.per_pair == 0  # also where one query attends to all tokens behind the blocks
    assert 2 * width * hidden <= last.per_token < 2 * width * hidden + 6 * width**2 + 10 * width


def test_schedules_at_the_macs_of_a_constant_r():
    model = ToyViT(Shape(image=(24, 24), depth=4), width=64).eval()  # 96 patches
    constant, late, share = (
        papr_fx.transform(model, toy_proposal(), 1, merge=papr_fx.Merge(4, "all", schedule=schedule), verify=False)
        for schedule in ("constant", "late", "share")
    )
    for z in (1, 0.5):
        for gm in (constant, late, share):
            papr_fx.set_keep_ratio(gm, z)
        reports = [papr_fx.report(gm) for gm in (constant, late, share)]
        _, rising, falling = ([before - after for _, before, after in found.reduced] for found in reports)
        plain, *others = (found.pruned_macs for found in reports)
        assert others == pytest.approx([plain, plain], rel=0.01)  # matching itself takes some
        assert rising == sorted(rising)
        assert rising[0] < 3
        assert rising[-1] > 6
        assert falling == sorted(falling, reverse=True)
        assert 2 < falling[-1] <= falling[0] < 6


@torch.no_grad()
def test_late_against_a_transcription_at_several_keep_ratios():
    model, x = eval_toy(image=(16, 24)), images(Shape(image=(16, 24)), 2)
    gm = papr_fx.transform(model, toy_proposal(), 1, merge=papr_fx.Merge(5, "all", schedule="late"))
    seen = set()
    for z in (1, 0.5):
        papr_fx.set_keep_ratio(gm, z)
        numbers = dict.fromkeys(range(DEPTH), 0)
        numbers |= {int(block[-1]): before - after for block, before, after in papr_fx.report(gm).reduced}
        seen.add(tuple(numbers.values()))
        agree(model, gm, reducers.Eager(in_turn(lambda r: reducers.merging(r, 1), numbers), range(DEPTH)))
    fresh = papr_fx.transform(model, toy_proposal(), 0.5, merge=papr_fx.Merge(5, "all", schedule="late"), verify=False)
    assert torch.equal(gm(x), fresh(x))
    assert len(seen) == 2  # fewer tokens: other numbers


def test_a_block_that_removes_nothing_stays_as_it_is():
    gm = papr_fx.transform(eval_toy(), toy_proposal(), 0.8, merge=papr_fx.Merge((2, 0, 3, 0), "all"), verify=False)
    assert papr_fx.report(gm).reduced == (("blocks.0", 14, 12), ("blocks.2", 12, 9))
    assert "reduced: 14 tokens to 9, in 2 blocks from `blocks.0` to `blocks.2`" in str(papr_fx.report(gm))
    matches = [line.strip() for line in gm.code.splitlines() if line.strip().startswith("papr_match")]
    assert [line.partition(" = ")[0] for line in matches] == ["papr_match_0", "papr_match_2"]
    diff = papr_fx.graph_diff(eval_toy(), gm)
    assert "match_tokens" in diff
    assert "papr_match_1" not in diff


def test_a_list_of_zeros_is_the_model_to_the_bit():
    model, x = eval_toy(), images(Shape(), 2)
    assert torch.equal(papr_fx.transform(model, toy_proposal(), 1, merge=papr_fx.Merge([0, 0]))(x), model(x))


@torch.no_grad()
def test_proved_copied_and_pickled():
    x = images(Shape(), 2)
    for merge in (papr_fx.Merge([1, 0, 2, 3], "all"), papr_fx.Merge(2, schedule="late")):
        gm = papr_fx.transform(eval_toy(), toy_proposal(), 0.8, merge=merge)
        assert torch.equal(copy.deepcopy(gm)(x), gm(x))
        assert torch.equal(pickle.loads(pickle.dumps(gm))(x), gm(x))
        assert hash(merge) == hash(copy.copy(merge))
    with pytest.raises(papr_fx.VerifyError, match="merging: the output is off"):
        papr_fx.transform(Summed(Shape()), toy_proposal(), 0.8, merge=papr_fx.Merge([2, 0], "all"))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"r": []}, "or a list of such numbers"),
        ({"r": "8"}, "or a list of such numbers"),
        ({"r": [1, -1]}, "or a list of such numbers"),
        ({"r": [1, True]}, "or a list of such numbers"),
        ({"r": None}, "or a list of such numbers"),
        ({"schedule": "early"}, "schedule must be one of 'constant', 'late', 'share'"),
        ({"r": [1, 2], "schedule": "late"}, "spreads one r over the blocks"),
    ],
)
def test_values(given, reason):
    with pytest.raises(papr_fx.ArgumentError, match=reason):
        papr_fx.Merge(**given)


def test_as_many_numbers_as_blocks():
    with pytest.raises(papr_fx.ArgumentError, match="r has 3 numbers, and blocks='second-half' picks 2 of 4 blocks: give 2"):
        papr_fx.transform(eval_toy(), toy_proposal(), 0.8, merge=papr_fx.Merge([1, 2, 3]))
    with pytest.raises(papr_fx.ArgumentError, match="r has 2 numbers, and blocks='all' picks 4 of 4 blocks"):
        papr_fx.transform(eval_toy(), toy_proposal(), 0.8, merge=peers.TokenFusion([1, 2]))


def test_more_than_half_of_the_patches():
    merge = papr_fx.Merge([4, 6])
    wanted = r"removes 6 tokens in `blocks.3`, which has 9 patches left at z=0.8, and half of them, 4, can go at most"
    with pytest.raises(papr_fx.NoSiteError, match=wanted):
        papr_fx.transform(eval_toy(), toy_proposal(), 0.8, merge=merge, verify=False)
    gm = papr_fx.transform(eval_toy(), toy_proposal(), 1, merge=merge, verify=False)  # 16 patches, 12, 6
    before = gm(images(Shape(), 2))
    with pytest.raises(papr_fx.NoSiteError, match=r"at z=0.8"):
        papr_fx.set_keep_ratio(gm, 0.8)
    assert gm.plan.z == 1
    assert torch.equal(gm(images(Shape(), 2)), before)


def test_at_given_macs():
    model = ToyViT(Shape(image=(16, 24)), width=32).eval()
    assert peers.reduction_named("papr+tome:late") == papr_fx.Merge(schedule="late")
    assert peers.reduction_named("tofu:late") == peers.TokenFusion(schedule="late")
    gm = papr_fx.transform(model, toy_proposal(), 1, merge=peers.reduction_named("tome:late"), verify=False)
    goal = int(0.9 * papr_fx.report(gm).dense_macs)
    fitted = peers.at_macs(gm, goal)
    assert papr_fx.report(fitted).total_macs == pytest.approx(goal, rel=0.02)
    assert fitted.plan.reduction.schedule == "late"
    lists = papr_fx.transform(model, toy_proposal(), 1, merge=papr_fx.Merge([1]), verify=False)
    with pytest.raises(papr_fx.ArgumentError, match="at_macs chooses the one r of a reduction"):
        peers.at_macs(lists, goal)
