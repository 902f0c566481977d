"""`python -m benchmarks.startup`: every column of a small model."""

import json

from benchmarks import startup


def test_a_small_model(monkeypatch, tmp_path, capsys):
    path = tmp_path / "startup.json"
    monkeypatch.setattr("sys.argv", ["startup", "--models", "test_vit", "--rounds", "1", "--no-compile", "--out", str(path)])
    startup.main()
    (row,) = json.loads(path.read_text())["rows"]
    assert row["model"] == "test_vit"
    assert 0 < row["transform"] < row["with proof"]
    assert row["forwards of a proof"] > 5
    assert "import papr_fx" in capsys.readouterr().out
