"""`python -m benchmarks.long_run`: some seconds of a life; a wrong answer ends it; the table."""

import json
import random
import threading

import pytest
import torch

from benchmarks import answers, long_run
from benchmarks.long_run import Life, Settings, changes, live, reloads, serves, trains


@pytest.fixture(scope="module", autouse=True)
def _tiny():
    """One model, few questions, nothing proved."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RATIOS": (1.0, 0.5), "SIZES": range(1, 3), "STARTS": (0,)}.items():
            patch.setattr(answers, name, value)
            patch.setattr(long_run, name, value)
        for model in ("ConvNeXt", "Swin"):
            patch.delitem(answers.MODELS, model)
        transformed = answers.Known.transformed
        patch.setattr(answers.Known, "transformed", lambda self, model, z, verify: transformed(self, model, z, verify=False))
        yield


@pytest.fixture(scope="module")
def life():
    torch.manual_seed(0)
    return Life.begin()


def test_each_work(life):
    draw = random.Random(0)
    before = life.served["ViT"]
    for work in (serves, changes, trains, reloads, serves):
        work(life, "ViT", draw)
    counts = life.counts
    assert (counts["changes"], counts["copies"], counts["reloads"]) == (1, 1, 1)
    assert counts["answers"] == counts["exact"] == 2 * 20 + 2 * 3 + 1
    assert life.served["ViT"] is not before


def test_a_call_may_see_what_is_set_meanwhile(life):
    served = life.served["ViT"]
    served.retarget(0.5)
    with served.called() as ratios:
        assert ratios == {0.5}
        served.retarget(1.0)
        assert ratios == {0.5, 1.0}
    with served.called() as ratios:
        served.retarget(0.5)
    served.retarget(1.0)
    assert ratios == {0.5, 1.0}


def test_a_life(monkeypatch, tmp_path, capsys):
    path = tmp_path / "life.json"
    given = ["long_run", "--minutes", "0.02", "--threads", "3", "--processes", "1", "--out", str(path)]
    monkeypatch.setattr("sys.argv", given)
    long_run.main()
    (row,) = json.loads(path.read_text())["rows"]
    assert row["images"] >= row["answers"] > 0
    assert row["wrong"] == row["not to the bit"] == 0
    assert row["MB end"] > 100
    assert len(row["samples"]) > 1
    printed = capsys.readouterr().out
    assert "| growth %" in printed
    monkeypatch.setattr("sys.argv", [*given, "--table"])
    long_run.main()
    assert capsys.readouterr().out in printed


def spoils(life, name, draw):
    """A weight of a served module changes."""
    with torch.no_grad():
        life.served[name].gm.get_parameter("head.bias").add_(torch.arange(10) / 100)


def forgets(life, name, draw):
    """The keep ratio changes behind the back of those who serve."""
    served = life.served[name]
    served.gm.retarget(1.5 - served.gm.plan.z)  # 1 or 0.5


@pytest.mark.parametrize("fault", [spoils, forgets])
def test_a_wrong_answer_ends_it(fault, monkeypatch):
    monkeypatch.setattr(long_run, "WORKS", {serves: 1, fault: 1})
    stop = threading.Event()
    with pytest.raises(answers.WrongAnswerError, match="ViT, Question.*relative error at the keep ratios in force"):
        live(Settings(60, threads=2), stop)
    assert stop.is_set()


def test_what_differs_by_rounding_is_told_apart(life):
    known = life.known["ViT"]
    question = answers.Question(0, 2)
    answer = known.answers[0.5][question]
    assert known.check(answer.clone(), question, [1.0, 0.5])
    assert not known.check(answer * (1 + 1e-6), question, [1.0, 0.5])
    with pytest.raises(answers.WrongAnswerError):
        known.check(answer * (1 + 1e-4), question, [1.0, 0.5])
    with pytest.raises(answers.WrongAnswerError):
        known.check(answer, question, [1.0])
    with pytest.raises(answers.WrongAnswerError):
        known.check(answer * float("nan"), question, [0.5])
