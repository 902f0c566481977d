"""`papr-fx show` on videos: the picture, the annotated clip, and what is refused."""

import pytest
import transformers
from PIL import Image

from papr_fx.cli.main import main
from papr_fx.video import read_video, write_video

from ..labelled_clips import moving_square


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small video model as save_pretrained writes it."""
    config = transformers.VideoMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=96, num_frames=6
    )
    path = tmp_path_factory.mktemp("video_model")
    transformers.VideoMAEForVideoClassification(config).save_pretrained(path)
    transformers.VideoMAEImageProcessor(size={"shortest_edge": 96}).save_pretrained(path)
    return path


def test_show_a_clip(folder, tmp_path, capsys):
    path, out = tmp_path / "square.mp4", tmp_path / "shown.png"
    write_video(path, moving_square())
    assert main(["show", str(path), "--model", str(folder), "--z", "0.5", "0.25", "--out", str(out)]) == 0, (
        capsys.readouterr().err
    )
    text = capsys.readouterr().out
    assert "108 -> 54" in text
    assert "108 -> 27" in text
    assert "papr_fx.embed_patches(permute, papr_keep, papr_convolution)  # (B, 32, 3, 6, 6)" in text
    with Image.open(out) as picture:
        assert picture.width < picture.height  # three columns, four rows
    shown = read_video(out.with_suffix(".mp4")) / 255
    assert shown.shape == (6, 3, 96, 192)
    plain, annotated = shown.split(96, dim=-1)
    assert 0.2 < float((annotated.mean(1) > 0.6 * plain.mean(1)).float().mean()) < 0.35  # 27 of 108 tubelets, others dark


def test_clips_that_are_refused(folder, tmp_path, capsys):
    path = tmp_path / "short.gif"
    frames = [Image.effect_noise((60, 50), 80).convert("RGB") for _ in range(4)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    for arguments, message in (
        (["show", str(path), "--model", str(folder)], "the clip has 4 frames, too few: the model takes 6"),
        (["show", str(path), "--model", "video_of_my_own"], "no video model named 'video_of_my_own'"),
        (["show", str(path), "--model", str(tmp_path)], "could not be loaded"),
        (["show", str(path), "--checkpoint", "a.pth"], "--checkpoint is read by timm"),
    ):
        assert main([*arguments, "--out", str(tmp_path / "out.png")]) == 2
        assert message in capsys.readouterr().err
