"""`papr-fx tune`: which samples it takes, what it prints, and what it refuses."""

import pytest
import torch

from papr_fx.choose import KeepRatio
from papr_fx.cli import tune
from papr_fx.cli.main import main

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


def test_tune_needs_no_data_for_macs(labelled, capsys):
    given = [str(part) for part in ["tune", *weights(labelled), "--gmacs", 1]]
    assert main(given) == 0
    assert "z = 1.0000" in capsys.readouterr().out
    assert main([*given[:-2], "--speedup", "2"]) == 2
    assert "tune needs data" in capsys.readouterr().err


def test_tune_names_what_it_left_out(damaged, capsys, monkeypatch):
    given = ["tune", damaged, *weights(damaged), "--workers", 0, "--max-drop", 1]
    assert main([str(part) for part in given]) == 0
    printed = capsys.readouterr().err
    assert "3 could not be read" in printed
    assert "06.png" in printed
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([str(part) for part in given]) == 2
    assert "tune runs on one process" in capsys.readouterr().err


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
        assert 0.05 <= float(printed.out.splitlines()[-1].removeprefix("z = ")) <= 1
