"""The comparison of ways to use fewer tokens, on a toy ViT."""

import onnxruntime
import pytest
import timm
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from torch import nn

import papr_fx
from benchmarks import comparison
from benchmarks.comparison import METHODS, accuracies, candidates, graph_breaks, judges_of, measure, onnx_export
from benchmarks.record import Run
from benchmarks.trained_vit import STATISTICS, Photographs

from ..models import Shape, ToyViT, enliven

SHAPE = Shape(image=(32, 32), patch=(4, 4), pool="cls")


def cheap_proposal():
    return nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()


@pytest.fixture
def vit(monkeypatch):
    monkeypatch.setattr(comparison, "lite0", cheap_proposal)
    monkeypatch.setattr(comparison, "LITE0_STATISTICS", STATISTICS)
    return enliven(ToyViT(SHAPE)).eval()


def photographs(count):
    return Photographs(torch.randn(count, 3, 32, 32), torch.arange(count) % 3)


def compared(model, names, size):
    """Methods at z=0.5, and PaPr's MACs there."""
    images = torch.randn(1, 3, size, size)
    found = dict(candidates(model, images, names, [0.5]))
    assert set(found) == {"dense", "PaPr, z=0.5", *(f"{name}, z=0.5" for name in names)}
    gm = papr_fx.transform(model, cheap_proposal(), 0.5, example_input=images, verify=False)
    assert found["PaPr, z=0.5"].macs == papr_fx.report(gm).total_macs
    return found, papr_fx.report(gm).total_macs


def test_backgrounds_and_maps_stay_at_the_keep_ratio(vit):
    found, macs = compared(vit, ["random patches", "PaPr, coarse background"], 32)
    assert found["random patches, z=0.5"].macs == macs
    assert 0.9 * macs < found["PaPr, coarse background, z=0.5"].macs < 1.1 * macs
    assert [papr_fx.report(candidate.module).z for candidate in list(found.values())[1:]] == [0.5] * 3


@pytest.mark.slow
@pytest.mark.usefixtures("vit")
def test_every_method_gets_the_macs_of_papr():
    found, macs = compared(timm.create_model("vit_tiny_patch16_224").eval(), [*METHODS], 224)
    for name, method in METHODS.items():
        gm = found[f"{name}, z=0.5"].module
        assert found[f"{name}, z=0.5"].macs == pytest.approx(macs, rel=0.03), name
        assert (gm.plan.reduction is not None) == bool(method.reduction)
        assert papr_fx.report(gm).z == (1 if not method.prunes else 0.55 if method.reduction else 0.5)


def test_differences_are_paired(vit):
    train, test = photographs(12), photographs(9)
    judges = judges_of(vit, train, test)
    dense, papr, other = accuracies(dict(candidates(vit, test.images[:1], ["random patches"], [0.5])), judges, test)
    assert dense["probe - PaPr"] == ""
    assert papr["probe - PaPr"] == "+0.0 +- 0.0"
    difference = float(other["probe"].split()[0]) - float(papr["probe"].split()[0])
    assert float(other["probe - PaPr"].split()[0]) == pytest.approx(difference, abs=0.11)


class Branching(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


class Broken(nn.Module):
    def forward(self, x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2


def test_breaks_are_counted(vit):
    images = torch.randn(2, 3, 32, 32)
    assert graph_breaks(vit, images) == 0
    assert graph_breaks(Broken(), images) == 1


def test_exports_are_judged(monkeypatch):
    linear, images = nn.Linear(4, 2).eval(), torch.randn(2, 4)
    assert onnx_export(linear, images) == "yes"
    assert onnx_export(Branching().eval(), images).startswith("no: ")
    session = onnxruntime.InferenceSession

    class Doubled(session):
        def run(self, *given):
            return [2 * value for value in super().run(*given)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Doubled)
    assert onnx_export(linear, images) == "no: outputs differ by 1.0e+00"

    def refuse(path):
        raise Fail("no operator")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    assert onnx_export(linear, images) == "no: Fail: no operator"


@pytest.mark.slow
def test_rows(vit):
    train, test = photographs(12), photographs(9)
    found = dict(candidates(vit, test.images[:1], ["token merging, late"], [0.5]))
    how, saved = Run(2, 2, torch.device("cpu")), []
    rows = measure(
        found, lambda: judges_of(vit, train, test), test, how, save=lambda rows: saved.append([{**row} for row in rows])
    )
    assert [row["method"] for row in rows] == ["dense", "PaPr, z=0.5", "token merging, late, z=0.5"]
    dense, papr, merged = rows
    assert dense["eager, times"] == dense["compiled, times"] == 1
    assert papr["MB"] < min(dense["MB"], merged["MB"])
    assert [row["breaks"] for row in rows] == [0, 0, 0]
    assert [row["ONNX"] for row in rows] == ["yes", "yes", "yes"]
    assert "probe" in saved[0][0]
    assert "eager, ms" not in saved[0][0]


@torch.no_grad()
def test_a_run_that_was_stopped_goes_on(vit, monkeypatch):
    """Nothing is measured twice, apart from the exports that are missing."""
    test = photographs(9)
    found = dict(candidates(vit, test.images[:1], [], [0.5]))
    measured = {"probe": "1.0", "eager, ms": 1.0, "compiled, ms": 2.0}
    known = [{"method": "dense", **measured, "ONNX": "yes"}, {"method": "PaPr, z=0.5", **measured}]
    monkeypatch.setattr(comparison, "graph_breaks", lambda *_: 3)
    monkeypatch.setattr(comparison, "onnx_export", lambda *_: "no")
    how, saved = Run(2, 2, torch.device("cpu")), []
    rows = measure(found, lambda: pytest.fail("fitted again"), test, how, known, saved.append)
    assert [row["ONNX"] for row in rows] == ["yes", "no"]
    assert "breaks" not in rows[0]
    assert rows[1].items() >= {**measured, "breaks": 3}.items()
    assert len(saved) == 1
