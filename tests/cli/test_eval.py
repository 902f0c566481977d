"""`papr-fx eval`: counts against a plain loop, the same on many processes and after interruptions; what it refuses."""

import json
import os
import signal
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import papr_fx
from papr_fx.cli import counting
from papr_fx.cli.main import main
from papr_fx.evaluation import evaluate
from papr_fx.evaluation.chance import with_random_map

from ..labelled import compared, counted, networks, options, rows_of, weights
from ..processes import run_processes


@pytest.fixture(scope="module")
def expected(labelled):
    """What a plain loop finds, image by image."""
    model, proposal = networks(labelled)
    config = resolve_data_config({}, model=model)
    preprocess = create_transform(**config, is_training=False)
    files = sorted((labelled / "validation").glob("*/*.png"))
    truth = [int(path.parent.name[-1]) for path in files]

    @torch.no_grad()
    def answers(form):
        return [int(form(preprocess(opened).unsqueeze(0)).argmax()) for opened in pictures]

    def share(found, wanted):
        return round(100 * sum(a == b for a, b in zip(found, wanted, strict=True)) / len(files), 3)

    pictures, rows = [Image.open(path).convert("RGB") for path in files], []
    dense = answers(model)
    for z in (1.0, 0.5, 0.3):
        statistics = ((config["mean"], config["std"]), (proposal.pretrained_cfg["mean"], proposal.pretrained_cfg["std"]))
        gm = papr_fx.transform(model, proposal, z, input_stats=statistics)
        found, random = answers(gm), {}
        if z < 1:
            twin = answers(with_random_map(gm, z))
            gains = [(a == label) - (b == label) for a, b, label in zip(found, twin, truth, strict=True)]
            random = {"random_top1": share(twin, truth), "random_agreement": share(twin, dense)}
            random |= {"map_gain": round(100 * sum(gains) / 41, 3)}
            random |= {"map_gain_error": round(100 * (sum(map(abs, gains)) + 1) ** 0.5 / 41, 3)}
        rows.append((z, share(found, truth), share(found, dense), papr_fx.report(gm).total_macs / 1e9, random))
    return rows


def test_counts_are_those_of_a_plain_loop(labelled, expected, tmp_path, capsys):
    results = tmp_path / "a.json"
    assert main(options(labelled, results, "--plot", tmp_path / "a.png", random=True)) == 0
    found = rows_of(results)
    assert [(row["z"], row["top1"], row["agreement"]) for row in found] == [row[:3] for row in expected]
    assert [compared(row) for row in found] == [row[4] | ({"verdict": "too few"} if row[4] else {}) for row in expected]
    assert [row["gmacs"] for row in found] == pytest.approx([row[3] for row in expected])
    assert found[0]["agreement"] == 100.0
    assert len({row["agreement"] for row in found}) == 3
    assert all(row["top1"] < row["top5"] < 100 and row["count"] == 41 and row["unreadable"] == 0 for row in found)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > 500
    printed = capsys.readouterr().out
    assert "| 0.30 |" in printed
    assert printed.count("too few images to tell whether the map is better than chance (map - random: ") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a.json"}


@pytest.mark.slow
def test_merging(labelled, tmp_path):
    results = tmp_path / "a.json"
    assert main(options(labelled, results, "--merge", 2, "--merge-blocks", "all")) == 0
    model, proposal = networks(labelled)
    found = rows_of(results)
    assert [(row["z"], row["r"]) for row in found] == [(1.0, 0), (1.0, 2), (0.5, 2), (0.3, 2)]
    config = resolve_data_config({}, model=model)
    preprocess = create_transform(**config, is_training=False)
    statistics = ((config["mean"], config["std"]), (proposal.pretrained_cfg["mean"], proposal.pretrained_cfg["std"]))
    for row in found[1:]:
        gm = papr_fx.transform(model, proposal, row["z"], merge=papr_fx.Merge(2, "all"), input_stats=statistics)
        right = 0
        for path in (labelled / "validation").glob("*/*.png"):
            with torch.no_grad(), Image.open(path) as opened:
                right += int(gm(preprocess(opened.convert("RGB"))[None]).argmax()) == int(path.parent.name[-1])
        assert row["top1"] == round(100 * right / 41, 3)
        assert row["gmacs"] == papr_fx.report(gm).total_macs / 1e9
    assert found[1]["gmacs"] < found[0]["gmacs"]


def test_merging_by_a_schedule(labelled, tmp_path, capsys):
    """Both forms are evaluated, and their rows say which they are; a list of another length is refused with both counts."""
    for text in ("2:late", "1,0,3"):
        results = tmp_path / "a.json"
        assert main(options(labelled, results, "--merge", text, "--z", 1)) == 0
        (row,) = rows_of(results)[1:]
        assert row["r"] == text
        assert row["gmacs"] < rows_of(results)[0]["gmacs"]
        assert f" {text} " in capsys.readouterr().out
    assert main(options(labelled, tmp_path / "b.json", "--merge", "1,2,3,4")) == 2
    assert "r has 4 numbers, and blocks='second-half' picks" in capsys.readouterr().err


class Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("harm"),))


def test_checkpoints_run_no_code(labelled, tmp_path, capsys, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    state = timm.create_model("test_vit", num_classes=7).state_dict()
    save_file(state, "model.safetensors")
    torch.save({"state_dict": state}, "model.pth")
    torch.save({"state_dict": state, "more": Harmful()}, "harm.pth")
    rows = []
    for name in ("model.safetensors", "model.pth"):
        assert main(options(labelled, tmp_path / "a.json", "--checkpoint", name)) == 0
        rows.append(counted(tmp_path / "a.json"))
        assert "random weights" not in capsys.readouterr().out
    assert rows[0] == rows[1]
    assert main(options(labelled, tmp_path / "b.json", "--checkpoint", "harm.pth")) == 2
    assert "weights of 'test_vit' could not be loaded" in capsys.readouterr().err
    assert not Path("harm").exists()


def in_short_chunks(arguments):
    """Two batches a chunk: with three processes, the second chunk is the last one and is not full."""
    evaluate._CHUNK = 2
    return main(arguments)


@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_many_processes_count_each_sample_once(labelled, expected, tmp_path, processes):
    """41 divides by neither; the last process has fewer samples."""
    results = tmp_path / "a.csv"
    given = options(labelled, results, "--z", "1.0,0.5", random=True)
    assert run_processes(in_short_chunks, given, folder=tmp_path, count=processes) == [0] * processes
    printed = [(tmp_path / f"out{rank}.txt").read_text() for rank in range(processes)]
    assert [text.count("| 0.50 |") for text in printed] == [1, *[0] * (processes - 1)]
    lines = results.read_text().splitlines()
    found = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    counts = [(float(row["z"]), float(row["top1"]), float(row["agreement"])) for row in found]
    assert counts == [row[:3] for row in expected if row[0] >= 0.5]
    assert {row["count"] for row in found} == {"41"}
    assert [compared(row) for row in found[1:]] == [
        {**{key: str(value) for key, value in row[4].items()}, "verdict": "too few"} for row in expected[1:] if row[0] >= 0.5
    ]
    assert set(compared(found[0]).values()) == {""}


def and_die(arguments):
    """Kills the process when it has written its first part."""
    write = counting.write_part

    def write_and_die(*given):
        write(*given)
        os.kill(os.getpid(), signal.SIGKILL)

    counting.write_part = write_and_die
    main(arguments)


def test_killed_and_resumed(labelled, tmp_path, capsys):
    whole, results = tmp_path / "whole.json", tmp_path / "a.json"
    small = ("--batch-size", 1, "--z", 0.5)
    assert main(options(labelled, whole, *small, random=True)) == 0
    assert run_processes(and_die, options(labelled, results, *small, random=True), folder=tmp_path) == [-signal.SIGKILL]
    part = tmp_path / "a.json.part"
    assert not results.exists()
    assert json.loads(part.read_text())["progress"]["done"] == 32
    assert main(options(labelled, results, *small, "--seed", 1, random=True)) == 2
    assert "other settings (seed)" in capsys.readouterr().err
    assert main(options(labelled, results, *small)) == 2
    assert "other settings (random)" in capsys.readouterr().err
    (labelled / "model.pth").touch()  # another file of that name
    assert main(options(labelled, results, *small, random=True)) == 2
    assert "other settings (files)" in capsys.readouterr().err
    known = json.loads(part.read_text())["settings"]["files"]["checkpoint"][1]
    os.utime(labelled / "model.pth", ns=(known, known))
    assert main(options(labelled, results, *small, random=True)) == 0
    assert "continuing after 32 of 41 samples" in capsys.readouterr().out
    assert counted(results) == counted(whole)
    assert "random_top1" in rows_of(whole)[1]
    assert [row["z"] for row in rows_of(results)] == [1.0, 0.5]
    assert not part.exists()


def test_unreadable_files_are_named_and_left_out(damaged, tmp_path, capsys):
    results = tmp_path / "a.json"
    assert main(options(damaged, results)) == 0
    assert {(row["count"], row["unreadable"]) for row in rows_of(results)} == {(17, 3)}
    printed = capsys.readouterr().err
    assert "3 could not be read" in printed
    assert all(name in printed for name in ("06.png", "12.png", "19.png"))
    assert "05.png" not in printed
    assert main(options(damaged, tmp_path / "b.json", "--strict")) == 2
    assert "unreadable: " in capsys.readouterr().err


def test_when_nothing_can_be_read(labelled, tmp_path, capsys):
    root = tmp_path / "none"
    for name in ("class0/a.png", "class1/b.png"):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_bytes(b"no image")
    for file in ("model.pth", "proposal.pth"):
        (root / file).write_bytes((labelled / file).read_bytes())
    assert main(options(root, tmp_path / "a.json")) == 2
    assert "none of the 2 samples" in capsys.readouterr().err
    assert not (tmp_path / "a.json.part").exists()
    assert main([str(part) for part in ["tune", root, *weights(root), "--workers", 0, "--speedup", 2]]) == 2
    assert "the loader holds no images" in capsys.readouterr().err


def test_what_cannot_be_written_is_told_before_the_work(labelled, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "folder.json").mkdir()
    for results in (tmp_path / "file" / "a.json", tmp_path / "folder.json"):
        assert main(options(labelled, results)) == 2
        printed = capsys.readouterr()
        assert "written" in printed.err
        assert "img/s" not in printed.err
    assert main(options(labelled, tmp_path / "a.json", "--plot", tmp_path / "file" / "a.png")) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_arguments(labelled, capsys):
    assert main(["eval", "nowhere", "--model", "test_vit", "--proposal", "test_resnet"]) == 2
    assert "there is no folder nowhere" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", "nowhere", "--z", "1.5"])
    assert "must lie in (0, 1], not 1.5" in capsys.readouterr().err
    assert main(options(labelled, "a.txt")) == 2
    assert "the file to write must end in .csv or .json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (("--img-size", "8"), "does not take"),
        (("--device", "foo"), "--device foo"),
        (("--checkpoint", "none.pth"), "there is no checkpoint none.pth"),
        (("--img-size", "33"), "does not take inputs of shape (1, 3, 33, 33)"),
        (("--proposal", "lite0"), "lite0 comes with its own weights"),
        (("--input-key", "image"), "columns of hfds/ data"),
    ],
)
def test_options_that_cannot_be_served(labelled, tmp_path, option, reason, capsys):
    assert main(options(labelled, tmp_path / "a.json", *option)) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [("--workers", "-1"), ("--interpolation", "foo"), ("--crop-pct", "0"), ("--seed", "-1"), ("--z", "0")]
)
def test_options_out_of_range(labelled, tmp_path, option, capsys):
    with pytest.raises(SystemExit):
        main(options(labelled, tmp_path / "a.json", *option))
    assert f"error: argument {'--workers/-j' if 'workers' in option[0] else option[0]}: " in capsys.readouterr().err


def test_keep_ratios_are_taken_once(labelled, tmp_path):
    assert main(options(labelled, tmp_path / "a.json", "--z", "0.5,0.5,1,1.0")) == 0
    assert [row["z"] for row in rows_of(tmp_path / "a.json")] == [1.0, 0.5]
