"""`python -m benchmarks.startup`: every column of a small model."""

import json
import time

from benchmarks import startup


def test_a_small_model(monkeypatch, tmp_path, capsys):
    path = tmp_path / "startup.json"
    monkeypatch.setattr(startup, "PROPOSAL", "test_resnet")
    monkeypatch.setattr(startup, "import_seconds", lambda module: {"timm": 1.5, "papr_fx": 2.5}[module])
    monkeypatch.setattr("sys.argv", ["startup", "--models", "test_vit", "--rounds", "1", "--no-compile", "--out", str(path)])
    startup.main()
    (row,) = json.loads(path.read_text())["rows"]
    assert row["model"] == "test_vit"
    assert 0 < row["transform"] < row["with proof"]
    assert row["forwards of a proof"] > 5
    assert "import timm 1.5, import papr_fx 2.5" in capsys.readouterr().out


def test_imports_are_those_of_a_new_process():
    start = time.perf_counter()
    found = startup.import_seconds("json")  # of a module that is loaded here already
    assert 0.005 < found < time.perf_counter() - start
