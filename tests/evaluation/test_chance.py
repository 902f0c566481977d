"""A map beside a random one: what is counted, what the verdict says, and the twin that is run."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import papr_fx
from papr_fx.cli.results import print_verdicts, row_of
from papr_fx.evaluation.chance import Versus, compared, remedy, with_random_map
from papr_fx.evaluation.counts import Counts, Progress
from papr_fx.evaluation.evaluate import RunSettings, evaluate
from papr_fx.evaluation.runner import Runner
from papr_fx.evaluation.variants import Variant
from papr_fx.proposals.chance import scattered, seeds

from ..models import Shape, ToyViT, images, toy_proposal
from ..models.clips import ClipViT, clip_proposal
from ..models.hierarchical import FAMILIES

ROWS = st.lists(st.tuples(*[st.integers(0, 2)] * 2, st.integers(-1, 2), st.integers(0, 2)), max_size=30)


@given(ROWS, st.lists(st.integers(0, 30), max_size=3))
def test_pairs_are_counted_as_a_plain_loop_does(rows, cuts):
    """In any parts, whose counts are added up."""
    found = Counts()
    edges = sorted({0, *(min(cut, len(rows)) for cut in cuts), len(rows)})
    for start, stop in pairwise(edges):
        part = Counts()
        part.compare(*torch.tensor(rows[start:stop]).view(-1, 4).unbind(1))
        found.add(part)
    expected = Counts()
    for best, twin, label, dense in rows:
        if label >= 0 and (best == label) != (twin == label):
            expected.wins += best == label
            expected.losses += twin == label
        if (best == dense) != (twin == dense):
            expected.wins_agree += best == dense
            expected.losses_agree += twin == dense
    assert found == expected


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 1000))
def test_the_figures_are_those_of_mcnemar(wins, losses, others):
    versus = Versus(wins + losses + others + 1, wins, losses)
    assert versus.difference == pytest.approx(100 * (wins - losses) / versus.images)
    assert 100 * (wins + losses) ** 0.5 / versus.images < versus.error
    # The test's statistic is (wins - losses)^2 / (wins + losses), with 4 for two standard errors; one image more is counted.
    significant = wins > losses and (wins - losses) ** 2 > 4 * (wins + losses + 1)
    assert (versus.verdict == "better") == significant


@pytest.mark.parametrize(
    ("versus", "verdict"),
    [
        (Versus(300, 100, 20), "better"),
        (Versus(300, 20, 100), "no better"),  # worse
        (Versus(1000, 50, 50), "no better"),
        (Versus(50_000, 2000, 1900), "no better"),
        (Versus(50_000, 2000, 1800), "better"),
        (Versus(60, 10, 8), "too few"),
        (Versus(300, 40, 30), "too few"),  # the map may be ten points better
        (Versus(1, 1, 0), "too few"),
        (Versus(1, 0, 1), "too few"),
        (Versus(8, 0, 0), "too few"),
        (Versus(41, 5, 0), "better"),
        (Versus(5, 4, 0), "too few"),
        (Versus(1000, 0, 0), "no better"),
    ],
)
def test_verdicts(versus, verdict):
    assert versus.verdict == verdict


def test_sentences():
    told = Versus(300, 20, 81, 'background="coarse", another proposal, or a map of your own')
    assert told.said() == (
        'on these images the map is no better than chance: use background="coarse", another proposal, or a map of your own'
    )
    assert str(told) == "-20.3 +- 3.4"
    assert Versus(300, 81, 20).said("videos") == "on these videos the map is better than chance"
    assert Versus(8, 1, 0).said() == "too few images to tell whether the map is better than chance"


def colours():
    """One for each of seven classes, brighter than the black around it, (7, 3)."""
    return torch.tensor([[1.0 + (number >> bit & 1) for bit in range(3)] for number in range(1, 8)])


class Squares(torch.utils.data.Dataset):
    """Black images of 4 x 4 patches; the colour of one patch says the class."""

    def __init__(self, order):
        self.order = order

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        number = self.order[index]
        image, (row, column) = torch.zeros(3, 16, 16), divmod(number * 7 % 16, 4)
        image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = colours()[number % 7, :, None, None] + number / 1e4
        return image, number % 7, index, ""


def reader():
    """A ViT that reads the colour if it sees the patch: its blocks add nothing."""
    model = ToyViT(Shape((16, 16), (4, 4), prefix=0, depth=1, pool="patches")).eval()
    with torch.no_grad():
        for layer in (model.blocks[0].attn.proj, model.blocks[0].mlp[-1]):
            layer.weight.zero_()
            layer.bias.zero_()
        model.pos.zero_()
        tokens = model.norm(model.patches(colours()[:, :, None, None].expand(-1, -1, 16, 16))[:, 0])
        ground = model.norm(model.patches(torch.zeros(1, 3, 16, 16))[:, 0])
        model.head.weight.copy_(nn.functional.normalize(tokens - ground))
        model.head.bias.copy_(-(model.head.weight @ ground[0]))
    return model


def brightness(sign):
    """A map that points to the bright patch, or away from it."""
    proposal = nn.Conv2d(3, 1, 4, 4)
    nn.init.constant_(proposal.weight, sign)
    nn.init.zeros_(proposal.bias)
    return proposal


def told(sign, order, batch_size=16):
    model = reader()
    gm = papr_fx.transform(model, brightness(sign), 0.25, saliency="psm", input_stats="shared", verify=False)
    runners = {"dense": Runner(model), "map": Runner(gm), "random": Runner(with_random_map(gm, 0.25))}
    settings = RunSettings("dense", batch_size, 0, twins={"map": "random"})
    found = evaluate(runners, Squares(order), settings)
    assert found.counts["dense"].top1 == len(order)
    for counts in found.counts.values():
        counts.seconds = 0.0
    return found, compared(found, "map", gm)


def test_a_map_that_points_to_the_class_is_better():
    found, versus = told(1.0, range(80))
    assert found.counts["map"].top1 == 80
    assert 0 < found.counts["random"].top1 < 50
    assert versus.verdict == "better"
    assert versus.difference == 100 * (80 - found.counts["random"].top1) / 80


def test_a_map_that_points_away_is_no_better():
    found, versus = told(-1.0, range(160))
    assert found.counts["map"].top1 < found.counts["random"].top1
    assert versus.verdict == "no better"
    assert 'use background="coarse"' in versus.said()
    few = told(-1.0, range(6))[1]
    assert few.verdict == "too few"


def test_counts_depend_on_no_batch_and_no_order():
    found = told(1.0, range(40))[0]
    assert found == told(1.0, range(40), 3)[0] == told(1.0, [*range(39, -1, -1)])[0]
    assert found.counts["map"].wins > 10


def test_without_classes_agreement_is_compared():
    class Unknown(Squares):
        def __getitem__(self, index):
            pixels, _, *rest = super().__getitem__(index)
            return pixels, -1, *rest

    model = reader()
    gm = papr_fx.transform(model, brightness(1.0), 0.25, input_stats="shared", verify=False)
    runners = {"dense": Runner(model), "map": Runner(gm), "random": Runner(with_random_map(gm, 0.25))}
    found = evaluate(runners, Unknown(range(40)), RunSettings("dense", 16, 0, twins={"map": "random"}))
    assert (found.counts["map"].wins, found.counts["map"].labelled) == (0, 0)
    assert compared(found, "map", gm) == Versus(40, 40 - found.counts["random"].agree, 0, remedy(gm))


def test_what_eval_prints_and_writes(capsys):
    gm = papr_fx.transform(ToyViT(Shape()).eval(), toy_proposal(), 0.3, verify=False)
    variant, dense = Variant(gm, 10**9, 0.3, twin=gm), Variant(gm, 10**9)
    counts = {"wins": 20, "losses": 81, "labelled": 300, "seconds": 1.0}
    found = Progress(300, 300, {variant.name: Counts(top1=147, **counts), variant.twin_name: Counts(300, top1=208)})
    found.counts[dense.name] = Counts(300, 245, seconds=1.0)
    row = row_of(SimpleNamespace(views=False), variant, found)
    assert {key: row[key] for key in row if key.startswith(("random", "map", "verdict", "top1"))} == {
        "top1": 49.0,
        "random_top1": 69.333,
        "random_agreement": 0.0,
        "map_gain": -20.333,
        "map_gain_error": 3.367,
        "verdict": "no better",
    }
    assert "verdict" not in row_of(SimpleNamespace(views=False), dense, found)
    print_verdicts([dense, variant], found, "images")
    assert capsys.readouterr().out == (
        'z=0.3: on these images the map is no better than chance: use background="coarse", another proposal, or a map of your '
        "own (map - random: -20.3 +- 3.4 points)\n"
    )


@pytest.mark.parametrize("background", ["auto", "coarse"])
def test_a_twin_of_tokens_keeps_by_chance(background):
    """As many tokens, by the scores of the image; the model itself stays as it was."""
    shape = Shape(image=(8, 12))
    gm = papr_fx.transform(ToyViT(shape).eval(), toy_proposal(), 0.9, background=background, verify=False)
    x = images(shape, 3, dtype=torch.float32)
    before = papr_fx.keep_masks(gm, x)
    twin = with_random_map(gm, 0.5)
    ((grid, mask),) = papr_fx.keep_masks(twin, x).items()
    scores = scattered(seeds(x), [*grid])
    assert torch.equal(papr_fx.significance(twin, x), scores)
    if background == "auto":
        k = int(mask[0].sum())
        best = scores.flatten(1).topk(k).indices
        assert torch.equal(mask.flatten(1), torch.zeros(3, mask[0].numel(), dtype=torch.bool).scatter(1, best, True))
    assert twin.plan.z == 0.5
    assert twin.head.weight is gm.head.weight
    assert all(torch.equal(mask, before[grid]) for grid, mask in papr_fx.keep_masks(gm, x).items())
    assert ("coarse" in remedy(gm)) == (background == "auto")


@pytest.mark.parametrize("saliency", ["psm", "motion"])
def test_a_twin_of_clips(saliency):
    """Also where the map needs no proposal."""
    proposal = clip_proposal() if saliency == "psm" else None
    clips = torch.randn(2, 3, 6, 12, 12)
    gm = papr_fx.transform(
        ClipViT((3, 3, 4), 1).eval(), proposal, 0.5, example_input=clips[:1], saliency=saliency, verify=False
    )
    assert torch.equal(papr_fx.significance(with_random_map(gm, 0.5), clips), scattered(seeds(clips), [3, 3, 4]))


def test_a_twin_of_pixels_keeps_the_same_places_on_every_grid():
    """A coarser grid takes the means of a finer one's scores."""
    gm = papr_fx.transform(FAMILIES["ConvNeXt"].model(), toy_proposal(), 0.5, verify=False)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    scores = scattered(seeds(x), [16, 16])
    masks = papr_fx.keep_masks(with_random_map(gm, 0.5), x)
    assert [*masks] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    for grid, mask in masks.items():
        means = nn.functional.avg_pool2d(scores, 16 // grid[0]).flatten(1)
        best = means.topk(mask[0].numel() // 2).indices
        assert torch.equal(mask.flatten(1), torch.zeros_like(means, dtype=torch.bool).scatter(1, best, True))
    assert "coarse" not in remedy(gm)
