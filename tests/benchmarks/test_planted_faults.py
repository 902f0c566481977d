"""Faults that are planted one by one: each still fits the text that it changes, and is seen where it should be."""

import ast
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.planted_faults import fault, table
from benchmarks.planted_faults.fault import FAULTS, ROOT, Fault
from tests.subjects import SUBJECTS

ROOMS = {"dataflow", "ops", "passes", "planning", "proposals", "tracing"}


@pytest.mark.parametrize("planted", FAULTS, ids=lambda planted: planted.name)
def test_each_fault_fits_the_code(planted):
    before, after = (ROOT / planted.path).read_text(), planted.applied()
    assert ast.dump(ast.parse(before)) != ast.dump(ast.parse(after))
    assert planted.function() is None or planted.function() <= len(before.splitlines())


def test_every_room_has_faults():
    assert len({planted.key for planted in FAULTS}) == len({planted.name for planted in FAULTS}) == len(FAULTS) >= 120
    counts = Counter(planted.room for planted in FAULTS)
    assert counts.keys() >= ROOMS
    assert min(counts[room] for room in ROOMS) >= 10


def test_models_of_unlike_structure():
    assert len({subject.name for subject in SUBJECTS}) == len(SUBJECTS) >= 25


def test_a_fault_that_no_longer_fits_says_so():
    with pytest.raises(ValueError, match="sought one place that reads 'no such text', found 0: stale"):
        Fault("stale", "papr_fx/ops/positions.py", "no such text", "").applied()


def test_patches_are_read_line_by_line(tmp_path):
    file = tmp_path / "some.txt"
    file.write_text("# one\n@ a.py\n-x = 1\n-y = 2\n+x = 3\n\n# two\n@ b/c.py\n= no matter\n-gone()\n")
    one, two = fault.read_faults(file)
    assert one == Fault("one", "a.py", "x = 1\ny = 2", "x = 3")
    assert two == Fault("two", "b/c.py", "gone()\n", "", "no matter")


def test_the_table():
    def entry(room, acting, suite, equivalent=""):
        return {"room": room, "acting": acting, "suite": suite, "equivalent": equivalent}

    seen = {"proof": "VerifyError", "differs": ["output"]}
    unseen, later = ({"proof": "", "differs": [name]} for name in ("output", "kept"))
    found = [entry("ops", [unseen, seen], "a test"), entry("ops", [unseen], ""), entry("ops", [], "", "why")]
    found += [entry("ops", [later], "a test"), entry("ops", None, "")]
    *_, ops, total = table.table([dict(enumerate(found))]).splitlines()
    assert [cell.strip() for cell in ops.split("|")[1:-1]] == ["ops", "5", "3", "2", "1", "1", "2"]
    assert total.split("|")[2].strip() == "5"


@pytest.mark.slow
def test_a_fault_is_planted_and_seen(tmp_path):
    """By processes of their own: a fault is put in place before the package is imported."""
    out = tmp_path / "faults.json"
    options = ["--models", "ViT, class token", "--only", "the least significant positions are kept", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.planted_faults", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads(out.read_text()).values()
    assert entry["acting"] == [{"model": "ViT, class token", "differs": entry["acting"][0]["differs"], "proof": "VerifyError"}]
    assert {"output", "kept"} <= {*entry["acting"][0]["differs"]}
    assert Path(entry["suite"].split("::")[0]).parts[:2] == ("tests", "ops")
