"""`papr-fx tune`: which samples it takes, what it prints, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch

from papr_fx.choose import KeepRatio, Point, RandomPoint
from papr_fx.cli import tune
from papr_fx.cli.main import main
from papr_fx.evaluation.chance import Versus

from ..labelled import weights


@pytest.mark.parametrize(("size", "samples"), [(41, 1000), (41, 41), (41, 9), (41, 1)])
def test_tune_takes_samples_from_all_of_the_data(labelled, monkeypatch, size, samples):
    seen = []
    monkeypatch.setattr(
        tune, "choose_keep_ratio", lambda model, proposal, loader, **_: seen.extend(loader) or KeepRatio(1, [(1, 1)])
    )
    given = ["tune", labelled, *weights(labelled), "--workers", 0, "--samples", samples, "--max-drop", 0.1, "--batch-size", 4]
    assert main([str(part) for part in given]) == 0
    labels = torch.cat([labels for _, labels in seen]).tolist()
    assert len(labels) == min(size, samples)
    assert samples == 1 or set(labels) == set(range(7))
    given += ["--no-labels"]
    seen.clear()
    assert main([str(part) for part in given]) == 0
    assert sum(map(len, seen)) == min(size, samples)


def test_tune_says_where_the_map_is_no_better(labelled, monkeypatch, capsys):
    """Ratios of one verdict share a sentence."""
    remedy, asked = 'background="coarse", another proposal, or a map of your own', {}
    curve = [Point(0.05, 0.4), Point(0.3, 0.3), Point(0.5, 0.2)]
    versus = [Versus(300, 20, 81, remedy), Versus(300, 20, 50, remedy), Versus(300, 90, 20, remedy)]
    random = [RandomPoint(z, 0.25, found) for (z, _), found in zip(curve, versus, strict=True)]
    monkeypatch.setattr(
        tune, "choose_keep_ratio", lambda *_, **given: asked.update(given) or KeepRatio(0.5, curve, random, 0.8125)
    )
    given = ["tune", str(labelled), *map(str, weights(labelled)), "--workers", "0", "--max-drop", "0.2"]
    assert main(given) == 0
    printed = capsys.readouterr().out
    assert f"\nz=0.05, 0.3: on these images the map is no better than chance: use {remedy}\n" in printed
    assert "\nz=0.5: on these images the map is better than chance\n" in printed
    assert "dense model: 81.25 % top-1\n" in printed
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line.startswith("| 0")]
    assert lines[0] == ["0.0500", "0.400", "0.250", "-20.3 +- 3.4", "no better"]
    assert asked["random"]
    assert main([*given, "--no-random"]) == 0
    assert not asked["random"]
    assert "note: of" not in capsys.readouterr().out
    assert main([*given[:-1], "0.02"]) == 0
    assert "note: of 41 samples one is 2.44 points, more than the 2 of --max-drop: z holds for" in capsys.readouterr().out


def test_views_of_a_video_count_as_one_sample(capsys):
    """Six views of each of 50 videos: three hundred answers, of which at worst six are always alike."""
    subject = SimpleNamespace(views=True, shape=(6, 4, 3, 32, 32))
    found = KeepRatio(0.5, [Point(0.5, 0.2)], [RandomPoint(0.5, 0.3, Versus(300, 60, 30))], 0.8125)
    assert found.random[0].versus.verdict == "better"
    tune._print_curve(found, "max drop", subject)
    printed = capsys.readouterr().out
    assert "z=0.5: too few videos to tell whether the map is better than chance" in printed
    assert "| +10.0 +- 8.0 " in printed
    assert "dense model: 81.25 % top-1 of single views\n" in printed


def test_tune_needs_no_data_for_macs(labelled, capsys):
    given = [str(part) for part in ["tune", *weights(labelled), "--gmacs", 1]]
    assert main(given) == 0
    assert "z = 1.0000" in capsys.readouterr().out
    assert main([*given[:-2], "--speedup", "2"]) == 2
    assert "tune needs data" in capsys.readouterr().err


def test_tune_names_what_it_left_out(damaged, capsys, monkeypatch):
    given = ["tune", damaged, *weights(damaged), "--workers", 0, "--max-drop", 1, "--no-random"]
    assert main([str(part) for part in given]) == 0
    printed = capsys.readouterr().err
    assert "3 could not be read" in printed
    assert "06.png" in printed
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([str(part) for part in given]) == 2
    assert "tune runs on one process" in capsys.readouterr().err


@pytest.mark.one_in(2)
@pytest.mark.parametrize("target", [["--gmacs", "0.02"], ["--max-drop", "0.5"], ["--max-drop", "0.9", "--no-labels"]])
def test_tune(labelled, target, capsys):
    given = ["tune", labelled, *weights(labelled), "--workers", 0, "--batch-size", 4, "--samples", 9, *target]
    code = main([str(part) for part in given])
    printed = capsys.readouterr()
    if "--gmacs" in target:
        assert code == 2
        assert "0.02 GMACs cannot be reached" in printed.err
    else:
        assert code == 0
        assert "| verdict   |" in printed.out
        assert 0.05 <= float(printed.out.splitlines()[-1].removeprefix("z = ")) <= 1
