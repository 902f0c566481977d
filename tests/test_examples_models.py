"""The examples of a detector, a depth model and a video classifier, on small models: what they print follows the keep ratio."""

from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import SwinTransformer

import papr_fx
from examples import depth, detect, video
from papr_fx.video import write_video

from .labelled_clips import moving_square
from .models import enliven

WIDTHS = (8, 16, 32, 64)


@pytest.fixture
def made(monkeypatch):
    """The pruned models that an example makes, without their proofs."""
    transform, found = papr_fx.transform, []

    def recorded(*given, **options):
        found.append(transform(*given, **options, verify=False))
        return found[-1]

    monkeypatch.setattr(papr_fx, "transform", recorded)
    return found


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
        pytest.param("retinanet", "swin_small_one", small_swin, marks=pytest.mark.slow),
        pytest.param("maskrcnn", "convnext_small_one", small_convnext, marks=pytest.mark.slow),
    ],
)
def test_detect(detector, body, build, proposal, made, monkeypatch, capsys):
    monkeypatch.setattr(detect, "get_model", lambda name, weights: SimpleNamespace(features=enliven(build()).features))
    arguments = ["--detector", detector, "--body", body, "--img-size", "64", "--rounds", "1", "--num-classes", "3"]
    arguments += ["--proposal", proposal]
    pruned = detect.main([*arguments, "--z", "0.4"])
    printed = capsys.readouterr().out
    assert f"{body} at (64, 64), z=0.4: " in printed
    assert "boxes mean nothing" in printed
    stages = [f"stage {place}" for place in range(4)]
    assert all(-1 <= pruned[stage] < 0.99 for stage in stages)  # at z=1 they are 1
    assert 0 < pruned["boxes"] <= 1
    assert all(pruned[f"{part}, {form}"] > 0 for part in ("body", "detector") for form in ("dense", "pruned"))


@pytest.mark.parametrize(("body", "build"), [("convnext_small_one", small_convnext), ("swin_small_one", small_swin)])
@torch.no_grad()
def test_stages_of_a_body(body, build, monkeypatch):
    whole = build().eval()
    monkeypatch.setattr(detect, "get_model", lambda name, weights: whole)
    images = torch.randn(2, 3, 64, 96)
    maps = detect.Body(body, pretrained=False).eval()(images)
    shapes = [(2, width, 64 // side, 96 // side) for width, side in zip(WIDTHS, (4, 8, 16, 32), strict=True)]
    assert [(name, value.shape) for name, value in maps.items()] == list(zip("0123", shapes, strict=True))
    last = whole.features(images)
    assert torch.equal(maps["3"], last.permute(0, 3, 1, 2) if "swin" in body else last)


def test_boxes_that_are_found_again():
    boxes = torch.tensor([[0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60.0]])
    dense = {"boxes": boxes, "labels": torch.tensor([1, 1, 2])}
    moved = {"boxes": boxes + torch.tensor([[1.0], [9.0], [0.0]]), "labels": torch.tensor([1, 1, 1])}
    assert detect.matched(dense, dense) == 1
    assert detect.matched(dense, moved) == pytest.approx(1 / 3)  # the second is elsewhere, the third is something else
    none = {"boxes": boxes[:0], "labels": moved["labels"][:0]}
    assert (detect.matched(dense, none), detect.matched(none, dense)) == (0, 1)


def test_depth(tmp_path, proposal, made, monkeypatch, capsys):
    build = depth.depth_model
    monkeypatch.setattr(depth, "depth_model", lambda given: enliven(build(given)))
    picture = tmp_path / "out" / "depth.png"
    arguments = ["--hidden-size", "64", "--num-layers", "4", "--img-size", "84", "--rounds", "1"]
    found = depth.main([*arguments, "--background", "coarse", "--proposal", proposal, "--output", str(picture)])
    assert abs(found["correlation"]) < 0.999  # at z=1 it would be 1
    assert "coarse tokens" in str(papr_fx.report(made[0]))
    with Image.open(picture) as drawn:
        assert drawn.width > 2 * drawn.height  # three panels
    assert f"picture: {picture}" in capsys.readouterr().out


def test_video(tmp_path, proposal, made, monkeypatch, capsys):
    build = video.video_model
    monkeypatch.setattr(video, "video_model", lambda given: enliven(build(given)))
    write_video(tmp_path / "clip.mp4", moving_square())
    small = ["--hidden-size", "64", "--num-layers", "1", "--num-frames", "4", "--img-size", "64", "--rounds", "1"]
    clip = [str(tmp_path / "clip.mp4"), *small, "--z", "0.3", "--temporal-views", "3"]
    by_map, by_motion = (video.main([*clip, *more])["scores"] for more in (["--proposal", proposal], ["--saliency", "motion"]))
    assert torch.equal(by_map["dense"], by_motion["dense"])
    for scores in (by_map, by_motion):
        assert (scores["dense"] - scores["pruned"]).abs().max() > 1e-3
        assert scores["pruned"].sum().item() == pytest.approx(1, abs=1e-5)
    assert not torch.allclose(by_map["pruned"], by_motion["pruned"])
    printed = capsys.readouterr().out
    assert "(3, 4, 3, 64, 64) views" in printed
    assert "pruned to z=0.3" in printed
    whole = video.main([*small, "--z", "1", "--saliency", "motion"])["scores"]  # of the clip of scikit-image
    assert torch.equal(whole["dense"], whole["pruned"])
    assert not torch.allclose(whole["dense"], by_map["dense"])
