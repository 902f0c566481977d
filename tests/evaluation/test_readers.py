"""Folders, tar files and Hugging Face data sets; what cannot be opened, and what would be skipped."""

import tarfile

import pytest
import torch

import papr_fx

from .pictures import expected, noise, opened, read_all, write_tar


def test_what_cannot_be_opened(shards, tmp_path, monkeypatch):
    with pytest.raises(papr_fx.ArgumentError, match="there is no folder nowhere"):
        opened("nowhere")
    with pytest.raises(papr_fx.ArgumentError, match="holds no files to read.*but 2 .tar, 1 .json"):
        opened(str(tmp_path))
    with pytest.raises(papr_fx.ArgumentError, match="split train not found.*--split 'val-{00..07}.tar'"):
        opened(f"wds/{shards}", split="train")
    with pytest.raises(papr_fx.ArgumentError, match="No such file"):
        opened(f"wds/{shards}", split="none-{0..1}.tar")
    with pytest.raises(papr_fx.ArgumentError, match="classes of shards are numbers"):
        opened(f"wds/{shards}", class_map="a.txt")
    write_tar(shards / "empty.tar", [])
    with pytest.raises(papr_fx.ArgumentError, match="there are no samples"):
        opened(f"wds/{shards}", split="empty.tar")
    monkeypatch.setattr("papr_fx.evaluation.readers.find_spec", lambda name: None)
    with pytest.raises(papr_fx.ArgumentError, match="needs the eval extra"):
        opened(f"wds/{shards}")


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_folders_tars_and_hugging_face_data_sets(folder, tmp_path):
    order = [0, 3, 6, 1, 4, 7, 2, 5, 8]  # class by class
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(folder / "validation", "validation")
    for reader in (
        opened(str(folder)),
        opened(str(tmp_path / "images.tar")),
        opened(f"hfds/{folder}", data_dir=str(tmp_path / "cache")),
    ):
        found = read_all(reader)
        assert [sample.label for sample in found] == [i % 3 for i in order]
        assert all(torch.equal(sample.pixels, expected(i)) for i, sample in zip(order, found, strict=True))
    classes = tmp_path / "classes.txt"
    classes.write_text("class2\nclass0\nclass1\n")
    assert [sample.label for sample in read_all(opened(str(folder), class_map=str(classes)))] == [
        1,
        1,
        1,
        2,
        2,
        2,
        0,
        0,
        0,
    ]


def test_what_a_folder_holds_is_not_passed_over(folder, tmp_path):
    with pytest.raises(papr_fx.ArgumentError, match="holds no tset"):
        opened(str(folder), split="tset")
    (folder / "validation" / "train").mkdir()
    (folder / "validation" / "train" / "a.png").write_bytes(noise(0))
    with pytest.raises(papr_fx.ArgumentError, match="holds no test"):
        opened(str(folder / "validation"), split="test")
    (folder / "train" / "class0").mkdir(parents=True)
    (folder / "validation").rename(folder / "held_out")
    with pytest.raises(papr_fx.ArgumentError, match="holds train, and none to evaluate on"):
        opened(str(folder))
    (folder / "held_out").rename(folder / "validation")
    assert len(opened(str(folder / "validation"))) == 10  # a class by that name is none of the splits
    (folder / "validation" / "train" / "a.png").unlink()
    classes = tmp_path / "classes.txt"
    classes.write_text("class2\nclass1\n")
    with pytest.raises(papr_fx.ArgumentError, match="does not list 1 of the classes in .*, such as class0"):
        opened(str(folder), class_map=str(classes))


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_columns_of_a_data_set(folder, tmp_path):
    data = {"data": f"hfds/{folder}", "data_dir": str(tmp_path / "cache")}
    assert len(opened(**data, keys={"input_key": "image", "target_key": "label"})) == 9
    with pytest.raises(papr_fx.ArgumentError, match="cannot read samples"):
        opened(**data, keys={"input_key": "picture"})
    with pytest.raises(papr_fx.ArgumentError, match="columns of hfds/ data"):
        opened(str(folder), keys={"input_key": "image"})
