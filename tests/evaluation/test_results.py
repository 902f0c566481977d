"""Files of results: whole or not there; a part file belongs to one run."""

import pytest

import papr_fx
from papr_fx.evaluation.counts import Counts, Progress
from papr_fx.evaluation.results import read_part, write_part, write_whole


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
