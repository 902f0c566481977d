"""The examples of a detector, a depth model and a video classifier, on small models: what they print follows the keep ratio."""

from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import SwinTransformer

from examples import depth, detect, video
from papr_fx.video import write_video

from .labelled_clips import moving_square
from .models import enliven

WIDTHS = (8, 16, 32, 64)


@pytest.fixture(scope="module")
def proposal(tmp_path_factory):
    """A small network that timm saved."""
    folder = tmp_path_factory.mktemp("proposal")
    timm.models.save_for_hf(timm.create_model("test_resnet"), folder)
    return f"local-dir:{folder}"


def small_convnext():
    return ConvNeXt([CNBlockConfig(width, after, 1) for width, after in zip(WIDTHS, (*WIDTHS[1:], None), strict=True)])


def small_swin():
    return SwinTransformer([4, 4], 8, [1] * 4, [1, 1, 2, 2], [2, 2])


@pytest.mark.parametrize(
    ("detector", "body", "build"),
    [
        ("fasterrcnn", "convnext_small_one", small_convnext),
        ("retinanet", "swin_small_one", small_swin),
        pytest.param("maskrcnn", "convnext_small_one", small_convnext, marks=pytest.mark.slow),
    ],
)
def test_detect(detector, body, build, proposal, monkeypatch, capsys):
    monkeypatch.setattr(detect, "get_model", lambda name, weights: SimpleNamespace(features=enliven(build()).features))
    arguments = ["--detector", detector, "--body", body, "--img-size", "64", "--rounds", "1", "--num-classes", "3"]
    arguments += ["--proposal", proposal]
    pruned = detect.main([*arguments, "--z", "0.4"])
    printed = capsys.readouterr().out
    assert f"{body} at (64, 64), z=0.4: " in printed
    assert "boxes mean nothing" in printed
    stages = [f"stage {place}" for place in range(4)]
    assert all(-1 <= pruned[stage] < 0.99 for stage in stages)
    assert 0 < pruned["boxes"] <= 1
    assert all(pruned[f"{part}, {form}"] > 0 for part in ("body", "detector") for form in ("dense", "pruned"))
    if "convnext" in body:
        dense = detect.main([*arguments, "--z", "1"])
        assert [dense[name] for name in (*stages, "boxes")] == pytest.approx([1.0] * 5, abs=1e-6)


def test_boxes_that_are_found_again():
    boxes = torch.tensor([[0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60.0]])
    dense = {"boxes": boxes, "labels": torch.tensor([1, 1, 2])}
    moved = {"boxes": boxes + torch.tensor([[1.0], [9.0], [0.0]]), "labels": torch.tensor([1, 1, 1])}
    assert detect.matched(dense, dense) == 1
    assert detect.matched(dense, moved) == pytest.approx(1 / 3)  # the second is elsewhere, the third is something else
    none = {"boxes": boxes[:0], "labels": moved["labels"][:0]}
    assert (detect.matched(dense, none), detect.matched(none, dense)) == (0, 1)


def test_depth(tmp_path, proposal, monkeypatch, capsys):
    build = depth.depth_model
    monkeypatch.setattr(depth, "depth_model", lambda given: enliven(build(given)))
    picture = tmp_path / "out" / "depth.png"
    arguments = ["--hidden-size", "64", "--num-layers", "4", "--img-size", "84", "--rounds", "1"]
    arguments += ["--proposal", proposal, "--output", str(picture)]
    drop, coarse = (depth.main([*arguments, "--background", name])["correlation"] for name in ("drop", "coarse"))
    assert max(abs(drop), abs(coarse)) < 0.999  # at z=1 it would be 1
    assert abs(drop - coarse) > 1e-3
    with Image.open(picture) as drawn:
        assert drawn.width > 2 * drawn.height  # three panels
    assert f"picture: {picture}" in capsys.readouterr().out


def test_video(tmp_path, proposal, monkeypatch, capsys):
    build = video.video_model
    monkeypatch.setattr(video, "video_model", lambda given: enliven(build(given)))
    write_video(tmp_path / "clip.mp4", moving_square())
    small = ["--hidden-size", "64", "--num-layers", "1", "--num-frames", "4", "--img-size", "64", "--rounds", "1"]
    small += ["--proposal", proposal]
    found = {}
    clip = str(tmp_path / "clip.mp4")
    for more in (["--z", "1"], ["--z", "0.3"], ["--z", "0.3", "--saliency", "motion"], ["--z", "0.3", "--temporal-views", "3"]):
        found[" ".join(more)] = video.main([clip, *small, *more])["scores"]
    dense, pruned, moving, views = found.values()
    assert torch.equal(dense["dense"], dense["pruned"])
    assert torch.equal(dense["dense"], pruned["dense"])
    for scores in (pruned, moving, views):
        assert (scores["dense"] - scores["pruned"]).abs().max() > 1e-3
        assert scores["pruned"].sum().item() == pytest.approx(1, abs=1e-5)
    assert not torch.allclose(pruned["pruned"], moving["pruned"])
    assert not torch.allclose(pruned["dense"], views["dense"])
    printed = capsys.readouterr().out
    assert "(3, 4, 3, 64, 64) views" in printed
    assert "pruned to z=0.3" in printed
    video.main([*small, "--saliency", "motion"])  # the clip of scikit-image
    assert "LABEL_" in capsys.readouterr().out
