"""`--background coarse`: the commands that take it, and what they print and draw."""

import json

import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image

import papr_fx
from papr_fx.cli.draw import dimmed, draw_clip
from papr_fx.cli.kept import COARSE, kept_levels, title
from papr_fx.cli.main import main
from papr_fx.evaluation import paper
from papr_fx.evaluation.paper import Line, Table

from ..models import Shape, ToyViT, images, toy_proposal

TINY = "test_vit"  # 10 x 10 patches
PROPOSAL = ["--proposal", "test_resnet"]


def pruned(background, z):
    shape = Shape(image=(10, 15), prefix=1)  # 5 x 5 patches
    gm = papr_fx.transform(ToyViT(shape).eval(), toy_proposal(), z, background=background, verify=False)
    return gm, images(shape, 2, dtype=torch.float32)


def test_levels_are_fine_coarse_and_dropped():
    gm, x = pruned("coarse", 0.5)
    (level,) = kept_levels(gm, x).values()
    assert set(level.unique().tolist()) == {COARSE, 1}
    assert title(0.5, level[0]) == "z=0.5: 4 of 5 x 5, 21 coarse"
    gm, x = pruned("coarse", 0.2)
    (level,) = kept_levels(gm, x).values()
    assert set(level.unique().tolist()) == {0, COARSE}
    assert torch.equal(level > 0, papr_fx.token_map(gm, x) >= 0)
    gm, x = pruned("auto", 0.2)
    (level,) = kept_levels(gm, x).values()
    assert title(0.2, level[0]) == "z=0.2: 5 of 5 x 5"


def test_coarse_cells_are_drawn_at_half_resolution():
    frame = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 3, 4, 4) / 16
    drawn = dimmed(frame, torch.tensor([[[1.0, COARSE], [0.0, COARSE]]]))
    assert torch.equal(drawn[:, :, :2, :2], frame[:, :, :2, :2])
    assert torch.allclose(drawn[:, :, 2:, :2], 0.15 * frame[:, :, 2:, :2])
    assert torch.allclose(drawn[:, :, :2, 2:], frame[:, :, :2, 2:].mean((2, 3), keepdim=True) * (0.15 + 0.85 * COARSE))


def test_rows_of_a_clip_are_named_beside_their_own_panels(tmp_path, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *given, **options: (figures.append(figure), save(figure, *given)))
    level, names = torch.full((2, 2, 2), COARSE), [title(z, torch.full((8, 14, 14), COARSE)) for z in (0.5, 0.3)]
    assert names[1] == "z=0.3: 0 of 8 x 14 x 14, 1568 coarse"
    draw_clip(tmp_path / "clip.png", torch.rand(2, 3, 8, 8), torch.rand(2, 2, 2), dict.fromkeys(names, level))
    (figure,) = figures
    for panel in figure.axes[4::2]:
        assert "coarse" in panel.get_ylabel()
        assert panel.yaxis.label.get_window_extent().height < panel.get_window_extent().height


def test_show_and_diff(tmp_path, capsys):
    photograph, out = tmp_path / "grey.png", tmp_path / "shown.png"
    Image.effect_noise((300, 200), 80).save(photograph)
    given = ["--model", TINY, *PROPOSAL, "--z", "0.4", "--background", "coarse", "--out", str(out)]
    assert main(["show", str(photograph), *given]) == 0
    assert out.exists()
    assert main(["diff", TINY, *PROPOSAL, "--background", "coarse"]) == 0
    assert "+papr_keep = papr_fx.choose_quads(papr_psm, 0.5, 1)  # (B, 50)" in capsys.readouterr().out


def test_bench_counts_the_second_embedding(tmp_path):
    file = tmp_path / "bench.json"
    counts = ["--batch-size", "1", "--num-bench-iter", "1", "--num-warm-iter", "0", "--results-file", str(file)]
    assert main(["bench", "--model", TINY, *PROPOSAL, "--reducers", "papr,coarse", *counts]) == 0
    macs = {row["variant"]: row["infer_gmacs"] * 1e9 for row in json.loads(file.read_text())}
    assert macs.keys() == {"dense", "dense channels-last", "papr z=0.5", "coarse z=0.5"}
    model, proposal = timm.create_model(TINY).eval(), timm.create_model("test_resnet")
    gm = papr_fx.transform(model, proposal, 0.5, background="coarse", verify=False)
    assert macs["coarse z=0.5"] == pytest.approx(papr_fx.report(gm).total_macs)


def test_eval_counts_coarse_variants(labelled, tmp_path, capsys):
    file = tmp_path / "results.json"
    given = ["--model", TINY, *PROPOSAL, "--num-classes", "7", "--z", "1.0,0.5", "--workers", "0", "--no-random"]
    assert main(["eval", str(labelled), *given, "--background", "coarse", "--results-file", str(file)]) == 0
    assert "proposal test_resnet (random weights), background coarse" in capsys.readouterr().out
    (row,) = [row for row in json.loads(file.read_text())["rows"] if row["z"] == 0.5]
    assert row["count"] == 41


def test_rows_of_ours_stand_behind_the_papers(monkeypatch, capsys):
    table = Table("Tab. 0", TINY, (Line(80.0, 0.2), Line(76.0, 0.1, z=0.5)), proposal="test_resnet")
    monkeypatch.setitem(paper.TABLES, "small", table)
    assert main(["reproduce", "small", "--background", "coarse"]) == 0
    *_, pruned, ours = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    pruned, ours = ([cell.strip() for cell in line.strip("|").split("|")] for line in (pruned, ours))
    assert (pruned[0], ours[0]) == ("PaPr z=0.5", "coarse z=0.5 (ours)")
    assert (pruned[2], ours[2]) == ("0.10", "")
    assert main(["reproduce", "all", "--background", "coarse"]) == 2
    assert "give the name of one table" in capsys.readouterr().err
