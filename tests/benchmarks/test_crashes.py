"""`python -m benchmarks.crashes`: two kills; and a results file that is half-written, or counts that differ, are seen."""

import json
from collections import Counter

import pytest

from benchmarks import crashes
from benchmarks.crashes import Evaluation, UnsoundError, crash

from ..processes import run_processes


def two_kills(path):
    import sys

    sys.argv = ["crashes", "--kills", "2", "--seed", "1", "--out", str(path)]
    crashes.main()


@pytest.mark.slow
def test_killed_twice(tmp_path):
    assert run_processes(two_kills, tmp_path / "crashes.json", folder=tmp_path) == [0], (tmp_path / "out0.txt").read_text()
    (row,) = json.loads((tmp_path / "crashes.json").read_text())["rows"]
    assert sum(row["kills"].values()) == 2
    assert row["runs"] > 0
    assert "| killed" in (tmp_path / "out0.txt").read_text()


def rows(**changed):
    return json.dumps({"rows": [{"z": 1.0, "img_per_sec": 3.0}, {"z": 0.5, "img_per_sec": 9.0, **changed}]})


class Faulty(Evaluation):
    """A run writes what is given, one after the other, and ends."""

    def __init__(self, folder, *written):
        self.folder, self.written = folder, iter(written)
        (folder / "crashing").mkdir()

    def started(self, results, prepare=lambda: None):
        results.write_text("z,img_per_sec\n1.0,3\n0.5,9\n" if results.name == "whole.csv" else next(self.written))
        return 1


@pytest.mark.parametrize(
    ("written", "error"),
    [
        ((rows(), rows(img_per_sec=1.0)), None),
        ((rows(), rows(top1=1.0)), UnsoundError),
        ((rows(), rows()[:-9]), json.JSONDecodeError),
    ],
)
def test_faults_are_seen(written, error, tmp_path, monkeypatch):
    monkeypatch.setattr(crashes, "_end", lambda child: 0)
    monkeypatch.setattr(crashes, "_once", lambda evaluation, results, *given: evaluation.started(results) and -9)
    monkeypatch.setattr("random.Random.choice", lambda self, given: given[0])
    evaluation = Faulty(tmp_path, *written)
    if error is None:
        assert crash(evaluation, 1, 0).kills == Counter({"after a time": 1})
        return
    with pytest.raises(error):
        crash(evaluation, 1, 0)
