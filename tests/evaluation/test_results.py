"""Files of results: whole or not there; a part file belongs to one run."""

import pytest

import papr_fx
from papr_fx.evaluation.counts import Counts, Progress
from papr_fx.evaluation.results import part_of, read_part, remove_part, write_part, write_whole


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


def test_what_killed_runs_left_goes_with_the_part_file(tmp_path):
    others = ["a.json", "a.csv.part", ".a.json.part", ".a.json.12.txt", ".b.json.12", ".a.json."]
    for name in [*others, "a.json.part", ".a.json.12", ".a.json.part.345"]:
        (tmp_path / name).touch()
    remove_part(tmp_path / "a.json")
    assert {path.name for path in tmp_path.iterdir()} == {*others}
    assert not part_of(tmp_path / "a.json").exists()
    remove_part(tmp_path / "nowhere" / "a.json")
