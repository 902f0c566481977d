"""`python -m benchmarks.damaged_files`: some files of each way; what must not be is found."""

import json
import os
import time

import pytest

import papr_fx
from benchmarks import damaged_files
from benchmarks.attempts import attempt
from benchmarks.file_kinds import kinds


def test_some_files(monkeypatch, tmp_path, capsys):
    path = tmp_path / "files.json"
    given = ["damaged_files", "--count", "100", "--seed", "0", "--only", "image", "--out", str(path)]
    monkeypatch.setattr("sys.argv", given)
    monkeypatch.setattr(damaged_files, "harmful", lambda mark: [])
    with pytest.raises(SystemExit) as ended:
        damaged_files.main()
    printed = capsys.readouterr().out
    assert ended.value.code == 0, printed
    rows = json.loads(path.read_text())["rows"]
    assert rows[-1] == {"faults": []}
    assert sum(row["files"] for row in rows[:-1]) == 100
    assert sum(row["read"] for row in rows[:-1]) > 0
    assert sum(row["refused"] for row in rows[:-1]) > 0
    monkeypatch.setattr("sys.argv", [*given, "--table"])
    damaged_files.main()
    sums = [sum(row[key] for row in rows[:-1]) for key in ("files", "read", "reported", "refused")]
    _, _, *lines = capsys.readouterr().out.splitlines()
    assert [line.replace("|", " ").split() for line in lines] == [[word, *map(str, sums)] for word in ("image", "all")]


@pytest.mark.slow
def test_harmful_files():
    cases = damaged_files.run(300, 0)
    assert damaged_files.faults(cases) == []
    assert {case.kind for case in cases} == {kind.name for kind in kinds()}


def refuses():
    raise papr_fx.ArgumentError("no")


def fails():
    raise TypeError("odd")


def hangs():
    time.sleep(60)


def dies():
    os.abort()


def grows():
    return "read" if bytearray(300_000_000) else ""


def asks_for_all():
    bytearray(1 << 40)


@pytest.mark.parametrize(
    ("read", "outcome"),
    [
        (lambda: "read", "read"),
        (refuses, "refused"),
        (fails, "other"),
        (hangs, "hang"),
        (dies, "crash"),
        (grows, "memory"),
        (asks_for_all, "memory"),
    ],
)
def test_what_comes_of_a_file(read, outcome):
    found = attempt(read, 1.0 if read is hangs else 60.0, 200.0)
    assert found.outcome == outcome, found
    if outcome == "other":
        assert found.message.startswith("TypeError: odd (test_damaged_files.py:")


def test_code_that_runs_is_seen(tmp_path, monkeypatch):
    (kind,) = [kind for kind in kinds() if kind.name == "class map: c.pkl"]
    bench = damaged_files.Bench(tmp_path, [kind])

    def read(folder):
        (tmp_path / damaged_files.MARK).touch()
        return "read"

    monkeypatch.setattr(bench, "kinds", [type(kind)(kind.name, kind.file, kind.write, read)])
    assert bench.at_random(0).found.outcome == "executed"
    assert not (tmp_path / damaged_files.MARK).exists()
