"""`papr-fx bench`: the rows that it writes, and what it refuses."""

import csv
import json

import pytest
import timm

import papr_fx
from papr_fx.cli.main import main


@pytest.mark.parametrize("suffix", [pytest.param(".csv", marks=pytest.mark.slow), ".json"])
def test_rows(tmp_path, capsys, suffix):
    file = tmp_path / f"bench{suffix}"
    arguments = [
        "--z",
        "0.5",
        "--reducers",
        "papr,transcription,tome,papr+tome:late",
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
