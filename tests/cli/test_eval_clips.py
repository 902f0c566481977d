"""`papr-fx eval` and `tune` on videos: counts against a plain loop over views, and what is refused."""

import json

import pytest
import timm
import torch
import transformers

import papr_fx
from papr_fx.cli.main import main
from papr_fx.evaluation.chance import with_random_map
from papr_fx.video import average_views

from ..labelled_clips import MEAN, STD, WORDS, views_of


@pytest.mark.one_in(2)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_videos_are_counted_by_the_mean_of_their_views(labelled_clips, tmp_path, batch_size, capsys):
    torch.save(timm_state(), tmp_path / "proposal.pth")
    results = tmp_path / "a.json"
    data, folder = labelled_clips / "kinetics", labelled_clips / "model"
    given = ["eval", data, "--model", folder, "--proposal", "test_resnet", "--z", "1,0.5"]
    given += ["--proposal-checkpoint", tmp_path / "proposal.pth"]
    given += ["--temporal-views", 2, "--spatial-views", 2, "--frame-step", 2]
    given += ["--proposal-size", 64, "--workers", 0, "--batch-size", batch_size, "--results-file", results]
    assert main([str(part) for part in given]) == 0
    model = transformers.VideoMAEForVideoClassification.from_pretrained(labelled_clips / "model").eval()
    proposal = create_proposal(tmp_path / "proposal.pth")
    statistics = ((MEAN, STD), (proposal.pretrained_cfg["mean"], proposal.pretrained_cfg["std"]))
    gm = papr_fx.transform(model, proposal, 0.5, input_stats=statistics, proposal_size=64)
    paths = [labelled_clips / "kinetics" / "val" / WORDS[i % 3] / f"{i}.mp4" for i in range(7) if i != 4]
    forms = (model, gm, with_random_map(gm, 0.5))
    best = {path: [int(average_views(form, views_of(path)).argmax()) for form in forms] for path in paths}
    rows = json.loads(results.read_text())["rows"]
    assert [row["count"] for row in rows] == [6, 6]
    assert [row["unreadable"] for row in rows] == [1, 1]
    for place, row in enumerate(rows):
        right = sum(found[place] == WORDS.index(path.parent.name) for path, found in best.items())
        agree = sum(found[place] == found[0] for found in best.values())
        assert (row["top1"], row["agreement"]) == (round(100 * right / 6, 3), round(100 * agree / 6, 3))
        assert row["videos_per_sec"] > 0
    right = [found[2] == WORDS.index(path.parent.name) for path, found in best.items()]
    agree = [found[2] == found[0] for found in best.values()]
    assert rows[1]["random_top1"] == round(100 * sum(right) / 6, 3)
    assert rows[1]["random_agreement"] == round(100 * sum(agree) / 6, 3)
    assert rows[1]["map_gain"] == pytest.approx(rows[1]["top1"] - rows[1]["random_top1"], abs=0.002)
    assert "too few videos to tell" in capsys.readouterr().out


def test_motion_needs_no_proposal(labelled_clips, tmp_path, capsys):
    """Counts are those of the module that keeps what moves; its multiply-accumulates are the model's alone."""
    results = tmp_path / "a.json"
    data, folder = labelled_clips / "kinetics", labelled_clips / "model"
    given = ["eval", data, "--model", folder, "--saliency", "motion", "--z", "0.5", "--temporal-views", 1]
    given += ["--spatial-views", 1, "--frame-step", 2, "--workers", 0, "--no-random", "--results-file", results]
    assert main([str(part) for part in given]) == 0
    assert "no proposal: motion" in capsys.readouterr().out
    model = transformers.VideoMAEForVideoClassification.from_pretrained(folder).eval()
    report = papr_fx.report(papr_fx.transform(model, None, 0.5, saliency="motion", verify=False))
    row = json.loads(results.read_text())["rows"][1]
    assert row["gmacs"] == report.pruned_macs / 1e9
    assert row["count"] == 6
    for more, reason in (
        (["--proposal-size", 64], "proposal_size and input_stats have no effect"),
        (["--shared-stats"], "saliency motion uses no proposal"),
        (["--proposal-checkpoint", "a.pth"], "saliency motion uses no proposal"),
    ):
        assert main([str(part) for part in [*given[:-2], *more]]) == 2
        assert reason in capsys.readouterr().err


def test_motion_is_for_clips(labelled, capsys):
    assert main(["eval", str(labelled), "--model", "test_vit", "--saliency", "motion*psm", "--z", "0.5"]) == 2
    assert "the model takes images (1, 3, 160, 160), no clips" in capsys.readouterr().err


def timm_state():
    torch.manual_seed(3)
    return timm.create_model("test_resnet").state_dict()


def create_proposal(path):
    return timm.create_model("test_resnet", checkpoint_path=str(path)).eval()


def test_ratios_are_tuned_on_views(labelled_clips, capsys):
    data, folder = labelled_clips / "kinetics", labelled_clips / "model"
    given = ["tune", data, "--model", folder, "--proposal", "test_resnet", "--max-drop", 1]
    given += ["--temporal-views", 1, "--spatial-views", 1, "--frame-step", 2, "--workers", 0, "--proposal-size", 64]
    assert main([str(part) for part in given]) == 0
    assert "z = 0.05" in capsys.readouterr().out


@pytest.mark.parametrize("option", [("--img-size", "32"), ("--crop-pct", "0.9"), ("--checkpoint", "a.pth")])
def test_options_of_images_are_refused_for_clips(labelled_clips, option, capsys):
    assert main(["eval", str(labelled_clips / "kinetics"), "--model", str(labelled_clips / "model"), *option]) == 2
    assert f"{option[0]} is for models of timm" in capsys.readouterr().err
    assert main(["eval", str(labelled_clips / "kinetics"), "--model", "nothing"]) == 2
    assert "no video model named 'nothing'" in capsys.readouterr().err


def test_a_video_model_without_its_normalisation(labelled_clips, tmp_path, capsys):
    transformers.VideoMAEForVideoClassification.from_pretrained(labelled_clips / "model").save_pretrained(tmp_path / "model")
    assert main(["eval", str(labelled_clips / "kinetics"), "--model", str(tmp_path / "model")]) == 2
    assert "save its image processor there too" in capsys.readouterr().err
