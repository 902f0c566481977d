"""The command line, run as users run it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import ExifTags, Image

from papr_fx.cli.main import _parser, main

TINY = ["--model", "vit_tiny_patch16_224"]


def test_demo(tmp_path, capsys):
    out = tmp_path / "made" / "papr.png"
    assert main(["demo", *TINY, "--out", str(out), "--z", "0.5", "0.3"]) == 0
    text = capsys.readouterr().out
    assert "random weights" in text
    assert "197 -> 99" in text
    assert "197 -> 60" in text
    assert "+papr_tokens = papr_fx.gather_tokens(norm_pre, papr_keep)  # (B, 60, 192)" in text
    with Image.open(out) as picture:
        assert picture.width > 3 * picture.height


@pytest.mark.parametrize("given", [["0.5,0.3"], ["0.5", "0.3"], ["0.5,0.3", "0.5"]])
def test_keep_ratios_with_commas_or_spaces(given):
    assert _parser().parse_args(["demo", "--z", *given]).z == (0.5, 0.3)
    assert _parser().parse_args(["bench", "--z", *given]).z == (0.5, 0.3)
    assert _parser().parse_args(["bench"]).z == (0.5,)
    with pytest.raises(SystemExit):
        _parser().parse_args(["demo", "--z", "2"])


def test_show_any_image_with_any_proposal(tmp_path, capsys):
    photograph = tmp_path / "grey.png"
    Image.effect_noise((300, 200), 80).save(photograph)
    out = tmp_path / "shown.png"
    assert main(["show", str(photograph), *TINY, "--proposal", "resnet18", "--z", "0.4", "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.width > picture.height
    assert str(out) in capsys.readouterr().out


def test_photographs_of_two_frames_are_images(tmp_path, capsys):
    photograph = tmp_path / "phone.jpg"
    frames = [Image.effect_noise((300, 200), 80).convert("RGB") for _ in range(2)]
    frames[0].save(photograph, format="MPO", save_all=True, append_images=frames[1:])
    out = tmp_path / "shown.png"
    assert main(["show", str(photograph), *TINY, "--proposal", "resnet18", "--z", "0.4", "--out", str(out)]) == 0


def test_diff(capsys):
    assert main(["diff", "vit_tiny_patch16_224", "--proposal", "resnet18", "--z", "0.5"]) == 0
    assert "+papr_keep = papr_fx.top_positions(papr_psm, 0.5, 1)  # (B, 99)" in capsys.readouterr().out


def corrupt(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: None, "No such file"),
        (corrupt, ""),
        (lambda path: path.write_text("no image"), "it holds text"),
        (lambda path: path.touch(), "it is empty"),
        (lambda path: path.mkdir(), "Is a directory"),
    ],
)
@pytest.mark.parametrize("model", [TINY, []])
def test_files_that_hold_no_image(write, reason, model, tmp_path, capsys):
    path = tmp_path / "photograph.JPG"
    write(path)
    assert main(["show", str(path), *model]) == 2
    assert re.search(f"cannot read an image from {path}: .*{reason}", capsys.readouterr().err)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_image_model_is_shown_the_first_frame_of_an_animation(suffix, tmp_path, capsys):
    path, out = tmp_path / f"animated.{suffix}", tmp_path / "shown.png"
    frames = [Image.effect_noise((60, 50), 80).convert("RGB") for _ in range(4)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    arguments = ["show", str(path), *TINY, "--proposal", "resnet18", "--z", "0.4", "--out", str(out)]
    assert main(arguments) == 0
    assert "its first frame is shown" in capsys.readouterr().err
    with Image.open(out) as picture:
        assert picture.width > picture.height


def test_files_that_do_not_fit_the_model(tmp_path, capsys):
    (tmp_path / "clip.mp4").write_bytes(b"any bytes")
    Image.new("RGB", (8, 8)).save(tmp_path / "photograph.png")
    assert main(["show", str(tmp_path / "clip.mp4"), *TINY]) == 2
    assert "vit_tiny_patch16_224 takes images, and Pillow finds none in" in capsys.readouterr().err
    assert main(["show", str(tmp_path / "photograph.png"), "--model", "videomae_base"]) == 2
    assert "videomae_base takes clips, and" in capsys.readouterr().err
    assert main(["show", str(tmp_path / "photograph.png"), "--model", "vit_of_my_own"]) == 2
    assert "timm knows no model named 'vit_of_my_own'" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["shown.png", "clip.png"])
def test_the_file_that_is_shown_is_not_written_over(out, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "shown.png")
    (tmp_path / "clip.mp4").write_bytes(b"any bytes")
    file = "shown.png" if out == "shown.png" else "clip.mp4"
    before = (tmp_path / file).read_bytes()
    assert main(["show", str(tmp_path / file), "--out", str(tmp_path / out)]) == 2
    assert f"would write over {tmp_path / file}" in capsys.readouterr().err
    assert (tmp_path / file).read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "0"], "argument --threads: must be at least 1, not 0"),
        (["--img-size", "-3"], "argument --img-size: must be at least 1, not -3"),
        (["--num-warm-iter", "-1"], "argument --num-warm-iter: must be at least 0, not -1"),
    ],
)
def test_bench_takes_no_negative_numbers(options, message, capsys):
    with pytest.raises(SystemExit):
        main(["bench", *options])
    assert message in capsys.readouterr().err


def test_bench_names_a_device_that_is_not_there(capsys):
    assert main(["bench", "--device", "gpu"]) == 2
    assert "--device gpu: " in capsys.readouterr().err


def test_photographs_are_shown_upright(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.effect_noise((300, 200), 80).save(tmp_path / "phone.jpg", exif=exif)
    sizes = []
    monkeypatch.setattr("papr_fx.cli.show.prune_image", lambda arguments, image: sizes.append(image.size))
    monkeypatch.setattr("papr_fx.cli.show.draw_image", lambda *given: None)
    assert main(["show", str(tmp_path / "phone.jpg"), *TINY, "--out", str(tmp_path / "out.png")]) == 0
    assert sizes == [(200, 300)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["diff", "vit_of_my_own"], "timm knows no model named 'vit_of_my_own'"),
        (["diff", "vit_smal_patch16_224"], "that timm saved; near: vit_small_patch16_224"),
        (["diff", "vit_tiny_patch16_224", "--proposal", "net_of_my_own"], "know no network named 'net_of_my_own'"),
        (["diff", "vit_tiny_patch16_224", "--z", "1.5"], "must lie in (0, 1]"),
        (["diff", "vit_tiny_patch16_224", "--proposal", "vit_tiny_patch16_224"], "no significance map"),
        (["diff", "resnet18"], "spatial layout"),
        (["diff", "local-dir:/no/such/folder"], "weights of 'local-dir:/no/such/folder' could not be loaded"),
        (["diff", "vit_tiny_patch16_224", "--checkpoint", "/no/such/file.pth"], "there is no checkpoint /no/such/file.pth"),
    ],
)
def test_refusals(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("out", ["folder", "picture.jpg", "/proc/nowhere/picture.png"])
def test_pictures_that_cannot_be_written(out, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    assert main(["demo", *TINY, "--out", str(tmp_path / out)]) == 2
    assert "--out must be a .png file" in capsys.readouterr().err


def test_a_checkpoint_that_is_none(tmp_path, capsys):
    (tmp_path / "own.pth").write_bytes(b"no checkpoint")
    assert main(["diff", "vit_tiny_patch16_224", "--checkpoint", str(tmp_path / "own.pth")]) == 2
    assert f"could not be loaded from {tmp_path / 'own.pth'}" in capsys.readouterr().err


def test_checkpoint_is_loaded(tmp_path, capsys):
    import timm
    import torch

    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "own.pth")
    assert main(["diff", "vit_tiny_patch16_224", "--checkpoint", str(tmp_path / "own.pth")]) == 0


def test_as_a_module():
    ran = subprocess.run([sys.executable, "-m", "papr_fx", "--help"], capture_output=True, text=True, check=True)
    assert "demo" in ran.stdout
    assert "show" in ran.stdout


def test_show_draws_every_stage_of_a_hierarchical_model(tmp_path, capsys):
    from PIL import Image
    from skimage.data import coffee

    Image.fromarray(coffee()).save(tmp_path / "photograph.png")
    out = tmp_path / "stages.png"
    arguments = ["show", str(tmp_path / "photograph.png"), "--model", "convnext_atto", "--z", "0.5", "0.25", "--out", str(out)]
    assert main(arguments) == 0
    with Image.open(out) as picture:
        width, height = picture.size
    assert width > 2 * height  # photograph, map and four stages across, two keep ratios down


def test_an_interrupted_command_says_so(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("papr_fx.cli.networks.image_model", interrupted)
    assert main(["diff", "vit_tiny_patch16_224"]) == 130
    assert capsys.readouterr().err == "papr-fx: interrupted\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "many"], "argument --workers/-j: must be a whole number, not 'many'"),
        (["--batch-size", "1.5"], "must be a whole number, not '1.5'"),
        (["--crop-pct", "all"], "argument --crop-pct: must be a number, not 'all'"),
    ],
)
def test_a_word_for_a_number_is_refused_in_plain_words(options, message, capsys):
    with pytest.raises(SystemExit):
        main(["eval", "data", *options])
    assert message in capsys.readouterr().err
