"""The examples run, on a few steps; with `--all` the small ViT is trained in full, and PSM has to beat random by far."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from benchmarks import clutter as measured
from examples import clutter, imagenet

from .versions import LOADERS_OF_TIMM

ROOT = Path(__file__).parent.parent


def run(*arguments, **options):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SCRIPTS = {"serve": "serve", "finetune": "training", "detect": "dense", "depth": "dense", "video": "video"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_and_its_page_name_each_other(name, capsys):
    assert f"](../examples/{name}.py)" in (ROOT / "docs" / f"{SCRIPTS[name]}.md").read_text()
    with pytest.raises(SystemExit) as stop:
        import_module(f"examples.{name}").main(["--help"])
    assert stop.value.code == 0
    assert f"docs/{SCRIPTS[name]}.md explains it" in " ".join(capsys.readouterr().out.split())


def test_images_are_what_they_say():
    train, test = clutter.cluttered(300, test=False), clutter.cluttered(200, test=True)
    assert train.pixels.shape == (300, 3, 56, 56)
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == set(range(10))
    again = clutter.cluttered(300, test=False)
    assert torch.equal(train.pixels, again.pixels)
    assert not torch.equal(train.pixels[:200], test.pixels)


@pytest.mark.slow
def test_training_example():
    out = run("-m", "examples.clutter", "--steps", 3, "--images", 120)
    assert "of held-out images right" in out
    assert [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")][2:] == ["1", "0.5"]


@pytest.mark.slow
def test_accuracy_table_and_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measured, "REDUCERS", ("papr+tome",))
    arguments = ["clutter", "--steps", "2", "--images", "120", "--z", "0.5", "0.3", "--out", str(tmp_path / "clutter.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    measured.main()
    rows = json.loads((tmp_path / "clutter.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["dense", "proposal", "GMACs", *measured.MAPS, "papr+tome"]
    assert all(0 <= row["z=0.5"] <= 100 for row in rows[3:])
    with Image.open(tmp_path / "clutter.png") as picture:
        assert picture.size[0] > 500
    assert "| psm " in capsys.readouterr().out


@pytest.mark.slow
@torch.no_grad()
def test_psm_is_far_above_random():
    with torch.enable_grad():
        images, held_out = clutter.cluttered(12000, test=False), clutter.cluttered(1000, test=True)
        proposal = clutter.proposal_for(images, 800)
        torch.manual_seed(1)
        model = clutter.small_vit()
        clutter.train(model, images, 800, rate=2.5e-3)
    found = {}
    for name in ("psm", "random", "inverse"):
        gm = measured.papr_fx.transform(model, proposal, 0.3, saliency=measured.MAPS[name])
        found[name] = clutter.accuracy(gm, held_out)
    assert found["psm"] > found["random"] + 20
    assert found["random"] > found["inverse"]


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "validation"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(8):
                colour = tuple(torch.randint(256, (3,)).tolist())
                Image.new("RGB", (80, 72), colour).save(tmp_path / split / label / f"{i}.png")
    return tmp_path


@LOADERS_OF_TIMM
@pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO:pytest.PytestUnraisableExceptionWarning")  # timm's reader
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_imagenet_recipe(folder, processes):
    """A pruned model trains on a folder; what it writes loads into the dense one."""
    proposal = folder / "proposal.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), proposal)
    arguments = [
        folder,
        "--model",
        "vit_tiny_patch16_224",
        "--num-classes",
        2,
        "--epochs",
        2,
        "--batch-size",
        4,
        "--workers",
        0,
    ]
    arguments += ["--workers", 0, "--proposal", "test_resnet", "--proposal-checkpoint", proposal, "--output", folder / "out"]
    if processes == 1:
        imagenet.main([str(argument) for argument in arguments])
    else:
        run("-m", "torch.distributed.run", "--nproc-per-node", 2, "-m", "examples.imagenet", *arguments)
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert [row["epoch"] for row in summary] == [0, 1]
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2)
    for name in ("last", "ema"):
        assert model.load_state_dict(torch.load(folder / "out" / f"{name}.pth", weights_only=True)) == ([], [])
