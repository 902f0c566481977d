"""`choose_keep_ratio`: the keep ratio for a target."""

import copy
import pickle

import pytest
import torch

import papr_fx
from papr_fx.choose import KeepRatio, Point, RandomPoint
from papr_fx.evaluation.chance import Versus, with_random_map

from .models import Shape, ToyViT, images, toy_proposal


def loader(count=3, *, labels=False):
    batches = [images(Shape(), 4, seed=i, dtype=torch.float32) for i in range(count)]
    return [(x, torch.randint(7, (4,))) for x in batches] if labels else batches


def test_choosing_by_macs():
    model = ToyViT(Shape(image=(32, 48))).eval()
    dense = papr_fx.report(papr_fx.transform(model, toy_proposal(), 0.5, verify=False))
    target = (0.5 * dense.dense_macs + dense.proposal_macs) / 1e9
    z = papr_fx.choose_keep_ratio(model, toy_proposal(), [], gmacs=target)
    assert 0.3 < z < 0.7
    for ratio, fits in ((float(z), True), (float(z) + 0.02, False)):
        total = papr_fx.report(papr_fx.transform(model, toy_proposal(), ratio, verify=False)).total_macs
        assert (total / 1e9 <= target) == fits
    assert len(z.curve) < 10
    assert z in [point.z for point in z.curve]
    assert sorted(z.curve) == list(z.curve)
    assert papr_fx.choose_keep_ratio(model, toy_proposal(), [], gmacs=1e3) == 1.0
    with pytest.raises(papr_fx.ArgumentError, match="cannot be reached"):
        papr_fx.choose_keep_ratio(model, toy_proposal(), [], gmacs=1e-9)


@pytest.mark.parametrize("labels", [False, True])
def test_choosing_by_accuracy(labels):
    torch.manual_seed(0)
    model = ToyViT(Shape(image=(16, 24), pool="avg")).train()
    x = [torch.randn(8, 3, 16, 24) for _ in range(3)]
    data = [(batch, model.eval()(batch).argmax(1)) for batch in x] if labels else x
    z = papr_fx.choose_keep_ratio(model.train(), toy_proposal(), data, max_drop=0.25)
    assert model.training
    assert z.dense == (1.0 if labels else None)
    seen = dict(z.curve)
    assert z == 1.0 or seen[min(seen, key=lambda ratio: abs(ratio - z))] <= 0.25
    assert any(value > 0.25 for value in seen.values())
    assert papr_fx.choose_keep_ratio(model, toy_proposal(), data, max_drop=1.0) == pytest.approx(0.05)


@pytest.mark.parametrize("labels", [False, True])
def test_a_random_map_is_measured_beside_the_chosen_one(labels):
    """Against a plain loop over images, at each ratio; the ratio found and its curve are the same without."""
    torch.manual_seed(0)
    model = ToyViT(Shape(image=(16, 24), pool="avg")).eval()
    x = [torch.randn(8, 3, 16, 24) for _ in range(3)]
    data = [(batch, torch.randint(7, (8,))) for batch in x] if labels else x
    target = {"max_drop": 0.25 if labels else 1.0, "verify": False}
    z = papr_fx.choose_keep_ratio(model, toy_proposal(), data, random=True, **target)
    alone = papr_fx.choose_keep_ratio(model, toy_proposal(), data, **target)
    assert (z, z.curve, alone.random) == (alone, alone.curve, ())
    assert [point.z for point in z.random] == [point.z for point in z.curve]
    gm = papr_fx.transform(model, toy_proposal(), 0.5, verify=False)
    pixels, dense = torch.cat(x), model(torch.cat(x)).argmax(1)
    truth = torch.cat([found for _, found in data]) if labels else dense
    for point, (ratio, drop) in zip(z.random[:2], z.curve[:2], strict=True):
        twin = with_random_map(gm, ratio)
        papr_fx.set_keep_ratio(gm, ratio)
        wins = losses = 0
        for image, label in zip(pixels, truth, strict=True):
            found, other = (int(form(image[None]).argmax()) == int(label) for form in (gm, twin))
            wins, losses = wins + (found and not other), losses + (other and not found)
        assert (point.versus.images, point.versus.wins, point.versus.losses) == (24, wins, losses)
        assert point.value == pytest.approx(drop + (wins - losses) / 24)
        assert "coarse" in point.versus.remedy
    none = papr_fx.choose_keep_ratio(model, toy_proposal(), data, max_drop=1.0, random=True, saliency="random", verify=False)
    assert none.random == ()


def test_choosing_by_speed(monkeypatch):
    from papr_fx import choose

    ratios = []

    def times(calls, *, rounds):
        z = ratios[-1]
        return {"dense": 1.0, "pruned": 0.1 + 0.9 * z}

    at = choose.sibling
    monkeypatch.setattr(choose, "sibling", lambda proved, *, z: ratios.append(z) or at(proved, z=z))
    monkeypatch.setattr(choose, "median_times", times)
    z = papr_fx.choose_keep_ratio(ToyViT(Shape()).eval(), toy_proposal(), loader(1), speedup=2.0)
    assert z == pytest.approx((0.5 - 0.1) / 0.9, abs=0.01)
    with pytest.raises(papr_fx.ArgumentError, match="a speed-up of 9 cannot be reached"):
        papr_fx.choose_keep_ratio(ToyViT(Shape()).eval(), toy_proposal(), loader(1), speedup=9.0)


@pytest.mark.parametrize("given", [{}, {"gmacs": 1, "speedup": 2}, {"max_drop": 2}, {"gmacs": -1}])
def test_one_target_is_needed(given):
    with pytest.raises(papr_fx.ArgumentError):
        papr_fx.choose_keep_ratio(ToyViT(Shape()), toy_proposal(), [], **given)


def test_flags_of_every_module_are_as_before():
    model = ToyViT(Shape(image=(16, 24))).train()
    model.norm.eval()
    before = {name: module.training for name, module in model.named_modules()}
    papr_fx.choose_keep_ratio(model, toy_proposal(), [], gmacs=1e3)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_a_keep_ratio_is_copied_and_pickled_with_its_curve():
    ratio = KeepRatio(0.5, [Point(0.5, 1.0), Point(0.05, 2.0)], [RandomPoint(0.5, 1.0, Versus(9, 2, 1))], 0.8)
    for again in (copy.copy(ratio), copy.deepcopy(ratio), pickle.loads(pickle.dumps(ratio))):
        assert again == 0.5
        assert again.curve == (Point(0.05, 2.0), Point(0.5, 1.0))
        assert (again.random, again.dense) == (ratio.random, 0.8)


def test_a_curve_holds_what_was_measured():
    z = papr_fx.choose_keep_ratio(ToyViT(Shape()).eval(), toy_proposal(), loader(1), speedup=1.0)
    assert z == 1.0
    assert z.curve == ()
