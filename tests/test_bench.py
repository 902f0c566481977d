"""`papr-fx bench`: peers against what they transcribe, and the rows it writes."""

import csv
import json
from dataclasses import replace

import pytest
import timm
import torch

import papr_fx
from papr_fx import bench, peers
from papr_fx.cli import main
from papr_fx.numerics import relative_error

from .models import Shape, ToyViT, enliven, images, toy_proposal
from .test_pixels import FAMILIES


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


def by_hand(x, keys, size, r, prefix):
    """Token merging of one sample, with Python lists: (N, C) tokens, (N, D) keys, sizes."""
    unit = [key / key.norm() for key in keys]
    a, b = range(0, len(x), 2), range(1, len(x), 2)
    best = {i: max((float(unit[i] @ unit[j]), j) for j in b if j >= prefix) for i in a if i >= prefix}
    ranked = sorted(best, key=lambda i: best[i], reverse=True)
    chosen = ranked[: min(r, (len(x) - prefix) // 2)]
    total, weight = {j: x[j] * size[j] for j in b}, {j: size[j] for j in b}
    for i in chosen:
        into = best[i][1]
        total[into], weight[into] = total[into] + x[i] * size[i], weight[into] + size[i]
    stay = [i for i in a if i not in chosen]
    if not prefix:
        stay.sort(key=lambda i: best[i], reverse=True)
    return torch.stack([x[i] for i in stay] + [total[j] / weight[j] for j in b]), [size[i] for i in stay] + list(
        weight.values()
    )


@pytest.mark.parametrize(("count", "r", "prefix"), [(9, 3, 1), (10, 2, 0), (7, 100, 1), (11, 2, 2), (8, 0, 0)])
def test_merging_against_lists(count, r, prefix):
    x, keys = torch.randn(3, count, 4, dtype=torch.float64), torch.randn(3, count, 5, dtype=torch.float64)
    size = torch.randint(1, 4, (3, count, 1)).double()
    matching = peers.match(keys, r, prefix)
    merged, sizes = peers.merge(x * size, matching) / peers.merge(size, matching), peers.merge(size, matching)
    for sample in range(3):
        expected, weights = by_hand(x[sample], keys[sample], size[sample, :, 0].tolist(), r, prefix)
        assert torch.allclose(merged[sample], expected, atol=1e-12, rtol=0)
        assert sizes[sample, :, 0].tolist() == weights


@torch.no_grad()
def test_a_vit_that_merges_nothing_is_itself():
    model = enliven(timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64)).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert relative_error(peers.MergedViT(model, 0)(x), model(x)) < 1e-12
    assert relative_error(peers.MergedViT(model, 2)(x), model(x)) > 1e-3


def test_merging_at_given_macs():
    model = timm.create_model("vit_tiny_patch16_224").eval()
    x = torch.zeros(1, 3, 224, 224)
    whole = peers.count_module_macs(model, x)
    merged = peers.merged_at(model, x, int(0.6 * whole))
    assert peers.count_module_macs(merged, x) == pytest.approx(0.6 * whole, rel=0.05)
    with pytest.raises(papr_fx.ArgumentError, match="has no"):
        peers.merged_at(timm.create_model("convnext_atto"), x, whole)


ROW = bench.Row("m", "papr z=0.5", "eager", 1, 224, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.9, 2.0)


@pytest.mark.parametrize(
    ("speeds", "expected"), [({1: 0.9, 8: 1.1, 32: 1.5}, 8), ({1: 1.2, 8: 0.9, 32: 1.1}, 32), ({1: 1.2, 8: 0.9}, None)]
)
def test_break_even(speeds, expected):
    rows = [replace(ROW, infer_batch_size=size, speed_up=speed) for size, speed in speeds.items()]
    rows.append(replace(ROW, variant="dense"))
    assert bench.break_even(rows) == {("m", "papr z=0.5", "eager"): expected}


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_rows(tmp_path, capsys, suffix):
    file = tmp_path / f"bench{suffix}"
    arguments = ["--z", "0.5", "--peers", "transcription", "merging", "--proposal", "resnet10t", "--results-file", str(file)]
    counts = ["--batch-size", "1", "2", "--num-bench-iter", "2", "--num-warm-iter", "0", "--img-size", "64"]
    assert main(["bench", "--model", "vit_tiny_patch16_224", *arguments, *counts]) == 0
    rows = list(csv.DictReader(file.read_text().splitlines())) if suffix == ".csv" else json.loads(file.read_text())
    assert len(rows) == 2 * 5
    pruned = next(row for row in rows if row["variant"] == "papr z=0.5")
    dense = next(row for row in rows if row["variant"] == "dense")
    assert {"model", "infer_samples_per_sec", "infer_step_time", "infer_batch_size", "infer_img_size", "infer_gmacs"} <= {
        *pruned
    }
    report = papr_fx.report(
        papr_fx.transform(
            timm.create_model("vit_tiny_patch16_224", img_size=64).eval(), timm.create_model("resnet10t"), 0.5, verify=False
        )
    )
    assert float(pruned["infer_gmacs"]) * 1e9 == pytest.approx(report.total_macs)
    assert float(dense["infer_gmacs"]) * 1e9 == pytest.approx(report.dense_macs)
    assert float(pruned["infer_samples_per_sec"]) == pytest.approx(1e3 / float(pruned["infer_step_time"]))
    assert "papr z=0.5, eager: " in capsys.readouterr().out


def test_refusals(capsys):
    assert main(["bench", "--model", "convnext_atto", "--peers", "merging", "--proposal", "resnet10t"]) == 2
    assert "token merging is measured on models" in capsys.readouterr().err
    assert main(["bench", "--model", "vit_tiny_patch16_224", "--results-file", "out/bench.txt"]) == 2
    assert ".csv or .json" in capsys.readouterr().err


@torch.no_grad()
def test_compiled_and_autocast():
    x = torch.zeros(1, 3, *Shape().image)
    chosen = bench.variants(ToyViT(Shape()).eval(), toy_proposal(), [0.5], images=x)
    rows = bench.benchmark("toy", chosen, x, batch_sizes=[2], compiled=True, autocast=torch.bfloat16, rounds=2, warmup=1)
    assert [row.run for row in rows] == ["compiled"] * 3
    assert max(row.speed_up for row in rows[:2]) == 1.0
    assert all(row.infer_step_time_low <= row.infer_step_time <= row.infer_step_time_high for row in rows)
