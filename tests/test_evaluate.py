"""Evaluation: counts against a plain loop, the same on many processes, behind faults and after interruptions."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import papr_fx
from papr_fx.choose import KeepRatio
from papr_fx.cli import main
from papr_fx.data import ImageDecoder, Samples
from papr_fx.evaluate import Counts, DataError, Progress, Runner, evaluate
from papr_fx.results import read_part, write_part, write_whole

from .models import Shape, ToyViT, enliven, images, toy_proposal

ROOT = Path(__file__).parent.parent
MODEL = ["--model", "test_vit", "--num-classes", "7", "--proposal", "test_resnet"]


def coloured(seed):
    colours = torch.randint(256, (4, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(colours.numpy()).resize((70, 60), Image.Resampling.NEAREST)


def save(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    coloured(seed).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """41 images in 7 classes, and checkpoints of the networks."""
    root = tmp_path_factory.mktemp("images")
    for i in range(41):
        save(root / "validation" / f"class{i % 7}" / f"{i:02d}.png", i)
    write_checkpoints(root)
    return root


def write_checkpoints(root):
    """A ViT that puts each class first for some images, and a proposal."""
    torch.manual_seed(0)
    vit = enliven(timm.create_model("test_vit", num_classes=7)).eval()
    preprocess = create_transform(**resolve_data_config({}, model=vit), is_training=False)
    with torch.no_grad():
        vit.head.bias -= vit(torch.stack([preprocess(coloured(i)) for i in range(41)])).mean(0)
    torch.save(vit.state_dict(), root / "model.pth")
    torch.save(timm.create_model("test_resnet").state_dict(), root / "proposal.pth")


def networks(root):
    model = timm.create_model("test_vit", num_classes=7, checkpoint_path=str(root / "model.pth")).eval()
    return model, timm.create_model("test_resnet", checkpoint_path=str(root / "proposal.pth")).eval()


def weights(folder):
    return [*MODEL, "--checkpoint", folder / "model.pth", "--proposal-checkpoint", folder / "proposal.pth"]


def options(folder, results, *more):
    given = ["eval", folder, *weights(folder), "--z", "1.0,0.5,0.3", "--workers", 0, "--batch-size", 4]
    return [str(part) for part in [*given, "--results-file", results, *more]]


def rows_of(path):
    return json.loads(path.read_text())["rows"]


def counted(path):
    keys = ("z", "top1", "top5", "agreement", "gmacs", "count", "unreadable")
    return [{key: row[key] for key in keys} for row in rows_of(path)]


@pytest.fixture(scope="module")
def expected(folder):
    """What a plain loop finds, image by image."""
    model, proposal = networks(folder)
    config = resolve_data_config({}, model=model)
    preprocess = create_transform(**config, is_training=False)
    rows = []
    for z in (1.0, 0.5, 0.3):
        statistics = ((config["mean"], config["std"]), (proposal.pretrained_cfg["mean"], proposal.pretrained_cfg["std"]))
        gm = papr_fx.transform(model, proposal, z, input_stats=statistics)
        top1 = agree = count = 0
        for path in sorted((folder / "validation").glob("*/*.png")):
            with torch.no_grad(), Image.open(path) as opened:
                x = preprocess(opened.convert("RGB")).unsqueeze(0)
                top1 += int(gm(x).argmax()) == int(path.parent.name[-1])
                agree += int(gm(x).argmax()) == int(model(x).argmax())
                count += 1
        rows.append((z, round(100 * top1 / count, 3), round(100 * agree / count, 3), papr_fx.report(gm).total_macs / 1e9))
    return rows


def test_counts_are_those_of_a_plain_loop(folder, expected, tmp_path, capsys):
    results = tmp_path / "a.json"
    assert main(options(folder, results, "--plot", tmp_path / "a.png")) == 0
    found = rows_of(results)
    assert [(row["z"], row["top1"], row["agreement"]) for row in found] == [row[:3] for row in expected]
    assert [row["gmacs"] for row in found] == pytest.approx([row[3] for row in expected])
    assert found[0]["agreement"] == 100.0
    assert len({row["agreement"] for row in found}) == 3
    assert all(row["top1"] < row["top5"] < 100 and row["count"] == 41 and row["unreadable"] == 0 for row in found)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > 500
    assert "| 0.30 |" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a.json"}


def test_merging(folder, tmp_path):
    results = tmp_path / "a.json"
    assert main(options(folder, results, "--merge", 2, "--merge-blocks", "all")) == 0
    model, proposal = networks(folder)
    found = rows_of(results)
    assert [(row["z"], row["r"]) for row in found] == [(1.0, 0), (1.0, 2), (0.5, 2), (0.3, 2)]
    config = resolve_data_config({}, model=model)
    preprocess = create_transform(**config, is_training=False)
    statistics = ((config["mean"], config["std"]), (proposal.pretrained_cfg["mean"], proposal.pretrained_cfg["std"]))
    for row in found[1:]:
        gm = papr_fx.transform(model, proposal, row["z"], merge=papr_fx.Merge(2, "all"), input_stats=statistics)
        right = 0
        for path in (folder / "validation").glob("*/*.png"):
            with torch.no_grad(), Image.open(path) as opened:
                right += int(gm(preprocess(opened.convert("RGB"))[None]).argmax()) == int(path.parent.name[-1])
        assert row["top1"] == round(100 * right / 41, 3)
        assert row["gmacs"] == papr_fx.report(gm).total_macs / 1e9
    assert found[1]["gmacs"] < found[0]["gmacs"]


class Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("harm"),))


def test_checkpoints_run_no_code(folder, tmp_path, capsys, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    state = timm.create_model("test_vit", num_classes=7).state_dict()
    save_file(state, "model.safetensors")
    torch.save({"state_dict": state}, "model.pth")
    torch.save({"state_dict": state, "more": Harmful()}, "harm.pth")
    rows = []
    for name in ("model.safetensors", "model.pth"):
        assert main(options(folder, tmp_path / "a.json", "--checkpoint", name)) == 0
        rows.append(counted(tmp_path / "a.json"))
        assert "random weights" not in capsys.readouterr().out
    assert rows[0] == rows[1]
    assert main(options(folder, tmp_path / "b.json", "--checkpoint", "harm.pth")) == 2
    assert "weights of 'test_vit' could not be loaded" in capsys.readouterr().err
    assert not Path("harm").exists()


def run(*arguments, check=True):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=check)


# Two batches a chunk: with three processes, the second chunk is the last one and is not full.
SHORT_CHUNKS = """
import sys
from papr_fx import evaluate
from papr_fx.cli import main
evaluate._CHUNK = 2
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_many_processes_count_each_sample_once(folder, expected, tmp_path, processes):
    """41 divides by neither; the last process has fewer samples."""
    results = tmp_path / "a.csv"
    script = tmp_path / "run.py"
    script.write_text(SHORT_CHUNKS)
    done = run("-m", "torch.distributed.run", "--nproc-per-node", processes, script, *options(folder, results))
    assert done.stdout.count("| 0.50 |") == 1
    lines = results.read_text().splitlines()
    found = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    assert [(float(row["z"]), float(row["top1"]), float(row["agreement"])) for row in found] == [row[:3] for row in expected]
    assert {row["count"] for row in found} == {"41"}


KILLED = """
import os, signal, sys
from papr_fx import cli_data
from papr_fx.cli import main
write = cli_data.write_part
def and_die(*given):
    write(*given)
    os.kill(os.getpid(), signal.SIGKILL)
cli_data.write_part = and_die
main(sys.argv[1:])
"""


def test_killed_and_resumed(folder, tmp_path, capsys):
    whole, results = tmp_path / "whole.json", tmp_path / "a.json"
    small = ("--batch-size", 1, "--z", 0.5)
    assert main(options(folder, whole, *small)) == 0
    assert run("-c", KILLED, *options(folder, results, *small), check=False).returncode == -signal.SIGKILL
    part = tmp_path / "a.json.part"
    assert not results.exists()
    assert json.loads(part.read_text())["progress"]["done"] == 32
    assert main(options(folder, results, "--z", 0.5, "--seed", 1)) == 2
    assert "other settings (seed)" in capsys.readouterr().err
    (folder / "model.pth").touch()  # another file of that name
    assert main(options(folder, results, *small)) == 2
    assert "other settings (files)" in capsys.readouterr().err
    known = json.loads(part.read_text())["settings"]["files"]["checkpoint"][1]
    os.utime(folder / "model.pth", ns=(known, known))
    done = run("-m", "papr_fx", *options(folder, results, *small))
    assert "going on behind 32 of 41 samples" in done.stdout
    assert counted(results) == counted(whole)
    assert [row["z"] for row in rows_of(results)] == [1.0, 0.5]
    assert not part.exists()


def test_a_part_of_another_run_is_refused(tmp_path):
    progress = Progress(8, 7, {"1": Counts(top1=3)}, [(2, "x")])
    write_part(tmp_path / "a.json", progress, {"model": "a", "z": (1.0,)})
    assert read_part(tmp_path / "a.json", {"model": "a", "z": (1.0,)}) == progress
    with pytest.raises(papr_fx.ArgumentError, match=r"other settings \(model\)"):
        read_part(tmp_path / "a.json", {"model": "b", "z": (1.0,)})
    (tmp_path / "b.json.part").write_text("{")
    with pytest.raises(papr_fx.ArgumentError, match="does not say how far"):
        read_part(tmp_path / "b.json", {})
    assert read_part(tmp_path / "c.json", {}) is None


def test_files_are_whole_or_not_there(tmp_path):
    write_whole(tmp_path / "folder" / "a", "text")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["a"]
    with pytest.raises(papr_fx.ArgumentError, match="cannot be written"):
        write_whole(tmp_path / "folder" / "a" / "b", "text")


@pytest.fixture
def damaged(tmp_path):
    root = tmp_path / "damaged"
    for i in range(20):
        save(root / "validation" / f"class{i % 7}" / f"{i:02d}.png", i)
    for name in ("class6/06.png", "class5/19.png"):
        (root / "validation" / name).write_bytes(b"no image")
    whole = (root / "validation" / "class5" / "12.png").read_bytes()
    (root / "validation" / "class5" / "12.png").write_bytes(whole[: len(whole) // 2])
    write_checkpoints(root)
    return root


def test_unreadable_files_are_named_and_left_out(damaged, tmp_path, capsys):
    results = tmp_path / "a.json"
    assert main(options(damaged, results)) == 0
    assert {(row["count"], row["unreadable"]) for row in rows_of(results)} == {(17, 3)}
    told = capsys.readouterr().err
    assert "3 could not be read" in told
    assert all(name in told for name in ("06.png", "12.png", "19.png"))
    assert "05.png" not in told
    assert main(options(damaged, tmp_path / "b.json", "--strict")) == 2
    assert "unreadable: " in capsys.readouterr().err


def test_when_nothing_can_be_read(folder, tmp_path, capsys):
    root = tmp_path / "none"
    for name in ("class0/a.png", "class1/b.png"):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_bytes(b"no image")
    for file in ("model.pth", "proposal.pth"):
        (root / file).write_bytes((folder / file).read_bytes())
    assert main(options(root, tmp_path / "a.json")) == 2
    assert "none of the 2 samples" in capsys.readouterr().err
    assert not (tmp_path / "a.json.part").exists()
    assert main([str(part) for part in ["tune", root, *weights(root), "--workers", 0, "--speedup", 2]]) == 2
    assert "the loader holds no images" in capsys.readouterr().err


def test_what_cannot_be_written_is_told_before_the_work(folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "folder.json").mkdir()
    for results in (tmp_path / "file" / "a.json", tmp_path / "folder.json"):
        assert main(options(folder, results)) == 2
        told = capsys.readouterr()
        assert "written" in told.err
        assert "img/s" not in told.err
    assert main(options(folder, tmp_path / "a.json", "--plot", tmp_path / "file" / "a.png")) == 2
    assert "cannot be written" in capsys.readouterr().err


class Fixed(torch.utils.data.Dataset):
    """Samples of one number each, which is what the model returns; the last class is none."""

    def __init__(self, *labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return torch.tensor([float(index % 3)]), self.labels[index], index, ""


def one_hot(x):
    return torch.nn.functional.one_hot(x[:, 0].long(), 10).float() + torch.arange(10) / 100


def test_samples_without_a_class_are_no_mistakes():
    found = evaluate({"a": Runner(one_hot)}, Fixed(0, 1, -1, -1, 2), dense="a", workers=0, batch_size=2)
    assert (found.total, found.counts["a"]) == (5, Counts(3, 2, 2, 5, 0, 0, found.counts["a"].seconds))
    none = evaluate({"a": Runner(one_hot)}, Fixed(-1, -1), dense="a", workers=0)
    assert (none.total, none.counts["a"].labelled, none.counts["a"].top1) == (2, 0, 0)


def test_reassessed_labels():
    labels = {0: (0, 5), 1: (), 2: (1,), 3: (0,)}
    found = evaluate({"a": Runner(one_hot)}, Fixed(9, 9, 9, 9), dense="a", workers=0, real_labels=labels.__getitem__)
    assert (found.counts["a"].real, found.counts["a"].real_total, found.counts["a"].top1) == (2, 3, 0)
    assert found.counts["a"].top5 == 4  # class 9 comes second


def test_each_shape_is_run_once_untimed(monkeypatch):
    shapes = []

    def slow_at_first(x):
        time.sleep(0.0 if len(x) in shapes else 0.2)
        shapes.append(len(x))
        return one_hot(x)

    found = evaluate({"a": Runner(slow_at_first)}, Fixed(*range(8)), dense="a", workers=0, batch_size=3)
    assert shapes == [3, 3, 3, 2, 2]
    assert found.counts["a"].seconds < 0.2


def test_batches_are_halved_where_memory_is_short():
    calls = []

    def small(x):
        calls.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return x * 2

    runner = Runner(small)
    x = torch.arange(10.0).unsqueeze(1)
    assert torch.equal(runner(x), x * 2)
    assert calls == [10, 8, 4, 2, 2, 2, 2, 2]
    calls.clear()
    assert torch.equal(runner(x[:5]), x[:5] * 2)
    assert calls == [2, 2, 1]  # it stays so

    def at_once(x):
        if len(x) > 5:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return x

    views = torch.rand(4, 3, 2)
    assert torch.equal(Runner(at_once, views=True)(views), views.softmax(-1).mean(1))

    def broken(x):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        Runner(broken)(x)

    def never(x):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Runner(never)(x)


class Reader(list):
    def filename(self, index, *_):
        return f"{index}.png"


def test_labels_beyond_the_model_are_refused():
    with pytest.raises(papr_fx.ArgumentError, match="class 7, but the model tells 4 apart"):
        evaluate({"1": Runner(lambda x: torch.zeros(len(x), 4))}, Fixed(7, 7), dense="1", workers=0)


def test_strict_names_the_file(tmp_path):
    bad = tmp_path / "a.png"
    bad.write_bytes(b"")
    data = Samples(Reader([(bad.open("rb"), 0)]), ImageDecoder(lambda image: torch.zeros(3, 2, 2)), (3, 2, 2))
    with pytest.raises(DataError, match="0.png"):
        evaluate({"1": Runner(lambda x: x)}, data, dense="1", workers=0, strict=True)


def test_arguments(folder, capsys):
    assert main(["eval", "nowhere", "--proposal", "test_resnet"]) == 2
    assert "there is no folder nowhere" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", "nowhere", "--z", "1.5"])
    assert "must lie in (0, 1], not 1.5" in capsys.readouterr().err
    assert main(options(folder, "a.txt")) == 2
    assert "a file that ends in .csv or .json is to be written" in capsys.readouterr().err


def loader(count=3, *, labels=False):
    batches = [images(Shape(), 4, seed=i, dtype=torch.float32) for i in range(count)]
    return [(x, torch.randint(7, (4,))) for x in batches] if labels else batches


def test_choosing_by_macs():
    model = ToyViT(Shape(image=(32, 48))).eval()
    dense = papr_fx.report(papr_fx.transform(model, toy_proposal(), 0.5, verify=False))
    target = (0.5 * dense.dense_macs + dense.proposal_macs) / 1e9
    z = papr_fx.choose_keep_ratio(model, toy_proposal(), [], gmacs=target)
    assert 0.3 < z < 0.7
    for ratio, fits in ((float(z), True), (float(z) + 0.02, False)):
        total = papr_fx.report(papr_fx.transform(model, toy_proposal(), ratio, verify=False)).total_macs
        assert (total / 1e9 <= target) == fits
    assert len(z.curve) < 10
    assert z in [point.z for point in z.curve]
    assert sorted(z.curve) == list(z.curve)
    assert papr_fx.choose_keep_ratio(model, toy_proposal(), [], gmacs=1e3) == 1.0
    with pytest.raises(papr_fx.ArgumentError, match="cannot be reached"):
        papr_fx.choose_keep_ratio(model, toy_proposal(), [], gmacs=1e-9)


@pytest.mark.parametrize("labels", [False, True])
def test_choosing_by_accuracy(labels):
    torch.manual_seed(0)
    model = ToyViT(Shape(image=(16, 24), pool="avg")).train()
    x = [torch.randn(8, 3, 16, 24) for _ in range(3)]
    data = [(batch, model.eval()(batch).argmax(1)) for batch in x] if labels else x
    z = papr_fx.choose_keep_ratio(model.train(), toy_proposal(), data, max_drop=0.25)
    assert model.training
    seen = dict(z.curve)
    assert z == 1.0 or seen[min(seen, key=lambda ratio: abs(ratio - z))] <= 0.25
    assert any(value > 0.25 for value in seen.values())
    assert papr_fx.choose_keep_ratio(model, toy_proposal(), data, max_drop=1.0) == pytest.approx(0.05)


def test_choosing_by_speed(monkeypatch):
    from papr_fx import choose

    ratios = []

    def times(calls, *, rounds):
        z = ratios[-1]
        return {"dense": 1.0, "pruned": 0.1 + 0.9 * z}

    at = choose._at
    monkeypatch.setattr(choose, "_at", lambda proved, z: ratios.append(z) or at(proved, z))
    monkeypatch.setattr(choose, "median_times", times)
    z = papr_fx.choose_keep_ratio(ToyViT(Shape()).eval(), toy_proposal(), loader(1), speedup=2.0)
    assert z == pytest.approx((0.5 - 0.1) / 0.9, abs=0.01)
    with pytest.raises(papr_fx.ArgumentError, match="a speed-up of 9 cannot be reached"):
        papr_fx.choose_keep_ratio(ToyViT(Shape()).eval(), toy_proposal(), loader(1), speedup=9.0)


@pytest.mark.parametrize("given", [{}, {"gmacs": 1, "speedup": 2}, {"max_drop": 2}, {"gmacs": -1}])
def test_one_target_is_needed(given):
    with pytest.raises(papr_fx.ArgumentError):
        papr_fx.choose_keep_ratio(ToyViT(Shape()), toy_proposal(), [], **given)


@pytest.mark.parametrize(("size", "samples"), [(41, 1000), (41, 41), (41, 9), (41, 1)])
def test_tune_takes_samples_from_all_of_the_data(folder, monkeypatch, size, samples):
    from papr_fx import cli_eval

    seen = []
    monkeypatch.setattr(
        cli_eval, "choose_keep_ratio", lambda model, proposal, loader, **_: seen.extend(loader) or KeepRatio(1, [(1, 1)])
    )
    given = ["tune", folder, *weights(folder), "--workers", 0, "--samples", samples, "--max-drop", 0.1, "--batch-size", 4]
    assert main([str(part) for part in given]) == 0
    labels = torch.cat([labels for _, labels in seen]).tolist()
    assert len(labels) == min(size, samples)
    assert samples == 1 or set(labels) == set(range(7))
    given += ["--no-labels"]
    seen.clear()
    assert main([str(part) for part in given]) == 0
    assert sum(map(len, seen)) == min(size, samples)


def test_tune_names_what_it_left_out(damaged, capsys, monkeypatch):
    given = ["tune", damaged, *weights(damaged), "--workers", 0, "--max-drop", 1]
    assert main([str(part) for part in given]) == 0
    told = capsys.readouterr().err
    assert "3 could not be read" in told
    assert "06.png" in told
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([str(part) for part in given]) == 2
    assert "tune runs on one process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (("--img-size", "8"), "does not take"),
        (("--device", "foo"), "--device foo"),
        (("--img-size", "33"), "does not take inputs of shape (1, 3, 33, 33)"),
        (("--proposal", "lite0"), "lite0 brings its weights along"),
        (("--input-key", "image"), "columns of hfds/ data"),
    ],
)
def test_options_that_cannot_be_served(folder, tmp_path, option, reason, capsys):
    assert main(options(folder, tmp_path / "a.json", *option)) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", [("--workers", "-1"), ("--interpolation", "foo"), ("--crop-pct", "0"), ("--seed", "-1"), ("--z", "0")]
)
def test_options_out_of_range(folder, tmp_path, option, capsys):
    with pytest.raises(SystemExit):
        main(options(folder, tmp_path / "a.json", *option))
    assert f"error: argument {'--workers/-j' if 'workers' in option[0] else option[0]}: " in capsys.readouterr().err


def test_keep_ratios_are_taken_once(folder, tmp_path):
    assert main(options(folder, tmp_path / "a.json", "--z", "0.5,0.5,1,1.0")) == 0
    assert [row["z"] for row in rows_of(tmp_path / "a.json")] == [1.0, 0.5]


@pytest.mark.parametrize("target", [["--gmacs", "0.02"], ["--max-drop", "0.5"], ["--max-drop", "0.9", "--no-labels"]])
def test_tune(folder, target, capsys):
    given = ["tune", folder, *weights(folder), "--workers", 0, "--batch-size", 4, "--samples", 9, *target]
    code = main([str(part) for part in given])
    told = capsys.readouterr()
    if "--gmacs" in target:
        assert code == 2
        assert "0.02 GMACs cannot be reached" in told.err
    else:
        assert code == 0
        assert 0.05 <= float(told.out.splitlines()[-1].removeprefix("z = ")) <= 1
