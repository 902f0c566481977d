"""`papr-fx bench`: peers against what they transcribe, and the rows it writes."""

import csv
import json
from dataclasses import replace

import pytest
import timm
import torch

import papr_fx
from papr_fx import peers
from papr_fx.cli.main import main
from papr_fx.evaluation.bench import Comparison, TimingSettings, benchmark, candidates
from papr_fx.evaluation.bench_rows import Row, break_even
from papr_fx.tracing.numerics import relative_error

from ..models import Shape, ToyViT, images, toy_proposal
from ..models.hierarchical import FAMILIES


@pytest.mark.parametrize("background", ["keep", "zero"])
@pytest.mark.parametrize("name", ["ConvNeXt", "ConvNeXt, 1x1 convolutions", "Swin", "torchvision Swin"])
@torch.no_grad()
def test_the_transcription_of_pixel_operators_is_the_same_model(name, background):
    family = FAMILIES[name]
    x = torch.randn(2, 3, *family.size, dtype=torch.float64)
    gm = papr_fx.transform(family.model(), toy_proposal(), 0.4, example_input=x[:1], background=background, verify=False)
    plain = peers.transcribed(gm)
    assert not {node.target for node in plain.graph.nodes} & {node.target for node in gm.graph.nodes if "papr_out" in node.name}
    assert relative_error(plain(x), gm(x)) < 1e-12


@torch.no_grad()
def test_the_transcription_of_tokens_is_the_same_model():
    gm = papr_fx.transform(ToyViT(Shape()).double().eval(), toy_proposal(), 0.5)
    x = images(Shape(), 3)
    assert relative_error(peers.transcribed(gm)(x), gm(x)) < 1e-12


def test_reducers_at_given_macs():
    model = timm.create_model("vit_tiny_patch16_224").eval()
    gm = papr_fx.transform(model, toy_proposal(), 1, merge=peers.reduction_named("tome"), verify=False)
    dense = papr_fx.report(gm).dense_macs
    fitted = peers.at_macs(gm, int(0.6 * dense))
    assert papr_fx.report(fitted).total_macs == pytest.approx(0.6 * dense, rel=0.05)
    assert fitted.plan.reduction.blocks == "all"
    whole = peers.at_macs(gm, 2 * dense)
    x = torch.randn(1, 3, 224, 224)
    assert whole.plan.reduction.r == 0
    assert torch.equal(whole(x), model(x))
    assert peers.reduction_named("papr+tome") == papr_fx.Merge(blocks="second-half")


ROW = Row("m", "papr z=0.5", "eager", 1, 224, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.9, 2.0)


@pytest.mark.parametrize(
    ("speeds", "expected"), [({1: 0.9, 8: 1.1, 32: 1.5}, 8), ({1: 1.2, 8: 0.9, 32: 1.1}, 32), ({1: 1.2, 8: 0.9}, None)]
)
def test_break_even(speeds, expected):
    rows = [replace(ROW, infer_batch_size=size, speed_up=speed) for size, speed in speeds.items()]
    rows.append(replace(ROW, variant="dense"))
    assert break_even(rows) == {("m", "papr z=0.5", "eager"): expected}


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_rows(tmp_path, capsys, suffix):
    file = tmp_path / f"bench{suffix}"
    arguments = [
        "--z",
        "0.5",
        "--reducers",
        "papr,transcription,tome,papr+tome",
        "--proposal",
        "test_resnet",
        "--results-file",
        str(file),
    ]
    counts = ["--batch-size", "1", "2", "--num-bench-iter", "2", "--num-warm-iter", "0", "--img-size", "64"]
    assert main(["bench", "--model", "vit_tiny_patch16_224", *arguments, *counts]) == 0
    rows = list(csv.DictReader(file.read_text().splitlines())) if suffix == ".csv" else json.loads(file.read_text())
    assert len(rows) == 2 * 6
    macs = [float(row["infer_gmacs"]) for row in rows if "dense" not in row["variant"]]
    assert max(macs) < 1.15 * min(macs)
    pruned = next(row for row in rows if row["variant"] == "papr z=0.5")
    dense = next(row for row in rows if row["variant"] == "dense")
    assert {"model", "infer_samples_per_sec", "infer_step_time", "infer_batch_size", "infer_img_size", "infer_gmacs"} <= {
        *pruned
    }
    report = papr_fx.report(
        papr_fx.transform(
            timm.create_model("vit_tiny_patch16_224", img_size=64).eval(), timm.create_model("test_resnet"), 0.5, verify=False
        )
    )
    assert float(pruned["infer_gmacs"]) * 1e9 == pytest.approx(report.total_macs)
    assert float(dense["infer_gmacs"]) * 1e9 == pytest.approx(report.dense_macs)
    assert float(pruned["infer_samples_per_sec"]) == pytest.approx(1e3 / float(pruned["infer_step_time"]))
    assert "papr z=0.5, eager: " in capsys.readouterr().out


def test_refusals(capsys):
    assert main(["bench", "--model", "convnext_atto", "--reducers", "papr,tome", "--proposal", "resnet10t"]) == 2
    assert "keep a spatial layout" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "--reducers", "papr,nothing"])
    assert "'nothing' is not one of papr, tome" in capsys.readouterr().err
    assert main(["bench", "--model", "vit_tiny_patch16_224", "--results-file", "out/bench.txt"]) == 2
    assert ".csv or .json" in capsys.readouterr().err


@torch.no_grad()
def test_compiled_and_autocast():
    x = torch.zeros(1, 3, *Shape().image)
    chosen = candidates(ToyViT(Shape()).eval(), toy_proposal(), x, Comparison([0.5]))
    settings = TimingSettings([2], compiled=True, autocast=torch.bfloat16, rounds=2, warmup=1)
    rows = benchmark("toy", chosen, x, settings)
    assert [row.run for row in rows] == ["compiled"] * 3
    assert max(row.speed_up for row in rows[:2]) == 1.0
    assert all(row.infer_step_time_low <= row.infer_step_time <= row.infer_step_time_high for row in rows)
