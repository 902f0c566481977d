"""Folders of classes: which files are read, how classes are numbered, what is skipped aloud, and what is refused."""

import os
import pickle
import tarfile

import pytest
from PIL import Image

import papr_fx
from papr_fx.evaluation.classes import numbered, read_class_map
from papr_fx.evaluation.decoders import VIDEO_SUFFIXES, ImageDecoder
from papr_fx.evaluation.samples import Samples

from .pictures import opened


def write(root, *names):
    """Writes an image, or an empty file where no format has that suffix."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in Image.registered_extensions():
            Image.new("RGB", (16, 16)).save(path)
        else:
            path.touch()
    return root


def as_tar(root):
    with tarfile.open(root.with_suffix(".tar"), "w") as tar:
        tar.add(root, "")
    return root.with_suffix(".tar")


def labels(reader):
    found = {}
    for index in range(len(reader)):
        source, found[reader.filename(index)] = reader[index]
        source.close()
    return found


def reader_of(root, kind, **options):
    return opened(str(as_tar(root) if kind == "tar" else root), **options)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_every_format_that_pillow_reads_counts(kind, tmp_path):
    suffixes = ("avif", "bmp", "gif", "JPG", "jpeg", "Png", "tif", "TIFF", "webp")
    names = [f"{place}/image.{suffix}" for place, suffix in enumerate(suffixes)]
    found = reader_of(write(tmp_path / "data", *names), kind)
    assert labels(found) == {name: place for place, name in enumerate(names)}
    assert all(not sample.error for sample in Samples(found, ImageDecoder(lambda image: image), ()))
    assert found.notes == ["9 classes in natural order: 0 = 0, 1 = 1, 2 = 2, ..., 7 = 7, 8 = 8"]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_orders_of_classes(kind, tmp_path):
    root = write(tmp_path / "data", *(f"{name}/1.png" for name in ("2", "10", "a", "B")))
    found = reader_of(root, kind)
    assert found.class_to_idx == {"2": 0, "10": 1, "a": 2, "B": 3}
    assert found.notes[-1].endswith("--class-order torchvision numbers them otherwise")
    from torchvision.datasets import ImageFolder

    found = reader_of(root, kind, order="torchvision")
    assert found.class_to_idx == ImageFolder(str(root)).class_to_idx == {"10": 0, "2": 1, "B": 2, "a": 3}
    assert found.notes[-1].startswith("4 classes in torchvision order: 0 = 10, 1 = 2, 2 = B, 3 = a")


def test_names_that_differ_in_case_have_one_order():
    names = ["Cat", "cat", "CAT"]
    assert numbered(names, "natural") == numbered(names[::-1], "natural") == {"CAT": 0, "Cat": 1, "cat": 2}


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_what_is_skipped_is_said(kind, tmp_path):
    names = ("a/1.png", "a/._1.png", ".thumbs/1.png", "__MACOSX/a/1.png", "b/1.png", "b/notes.txt", "b/2.heic", "seen.png")
    found = reader_of(write(tmp_path / "data", *names), kind)
    assert labels(found) == {"a/1.png": 0, "b/1.png": 1}
    assert found.notes == [
        "skipped 3 hidden files or folders, such as .thumbs",
        "skipped 2 files by their suffix: 1 .heic, 1 .txt",
        "skipped 1 files that are in no folder of a class, such as seen.png",
        "2 classes in natural order: 0 = a, 1 = b",
    ]


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("order", ["natural", "torchvision"])
@pytest.mark.parametrize(
    ("inside", "said"), [((), "b holds no files to read, and"), (("b/1.heic",), "to read, but 1 .heic, and")]
)
def test_an_empty_class_would_shift_the_others(kind, order, inside, said, tmp_path):
    root = write(tmp_path / "data", "a/1.png", "c/1.png", *inside)
    (root / "b").mkdir(exist_ok=True)
    with pytest.raises(papr_fx.ArgumentError, match=f"{said} whether it is a class"):
        reader_of(root, kind, order=order)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n\n")
    found = reader_of(root, kind, order=order, class_map=str(tmp_path / "classes.txt"))
    assert labels(found) == {"a/1.png": 0, "c/1.png": 2}
    assert "skipped 1 folders without files to read, such as b" in found.notes


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_folders_that_could_be_several_classes(kind, tmp_path):
    twice = write(tmp_path / "twice", "cats/held_out/1.png", "dogs/held_out/1.png")
    with pytest.raises(papr_fx.ArgumentError, match="cats/held_out and dogs/held_out would be one class"):
        reader_of(twice, kind)
    found = reader_of(twice, kind, order="torchvision")
    assert labels(found) == {"cats/held_out/1.png": 0, "dogs/held_out/1.png": 1}
    nested = write(tmp_path / "nested", "cats/1.png", "cats/wild/1.png", "dogs/1.png")
    with pytest.raises(papr_fx.ArgumentError, match="cats holds files and so does cats/wild"):
        reader_of(nested, kind)
    assert [*labels(reader_of(nested, kind, order="torchvision")).values()] == [0, 0, 1]
    inner = write(tmp_path / "inner", "all/cats/1.png", "all/dogs/1.png", "all/dogs/notes/a.txt")
    assert reader_of(inner, kind).class_to_idx == {"cats": 0, "dogs": 1}


def test_files_in_no_folder_have_no_class(tmp_path):
    found = opened(str(write(tmp_path / "data", "1.png", "2.png")))
    assert labels(found) == {"1.png": -1, "2.png": -1}
    assert "only agreement with the dense model is counted" in found.notes[0]
    assert not found.class_to_idx
    (tmp_path / "classes.txt").write_text("a\n")
    with pytest.raises(papr_fx.ArgumentError, match="holds files in none"):
        opened(str(tmp_path / "data"), class_map=str(tmp_path / "classes.txt"))


def test_a_folder_of_other_files(tmp_path):
    root = write(tmp_path / "data", "a/1.mp4", "a/2.MP4", "b/3")
    with pytest.raises(papr_fx.ArgumentError, match="holds no files to read .*, but 2 .mp4, 1 without suffix"):
        opened(str(root))
    (root / "b" / "3").rename(root / "b" / "3.webm")
    assert len(opened(str(root), suffixes=VIDEO_SUFFIXES)) == 3
    with pytest.raises(papr_fx.ArgumentError, match="is neither a folder nor a .tar or .csv file"):
        opened(str(root / "a" / "1.mp4"))


def test_splits_of_tar_files_and_tar_files_in_them(tmp_path):
    root = write(tmp_path / "data", "val/a/1.png", "val/b/1.png", "train/a/1.png", "train/c/1.png")
    assert labels(reader_of(root, "tar")) == {"a/1.png": 0, "b/1.png": 1}
    assert reader_of(root, "tar", split="train").class_to_idx == {"a": 0, "c": 1}
    with pytest.raises(papr_fx.ArgumentError, match="holds no test"):
        reader_of(root, "tar", split="test")
    (tmp_path / "outer").mkdir()
    as_tar(write(tmp_path / "n01", "1.png")).rename(tmp_path / "outer" / "n01.tar")
    found = reader_of(tmp_path / "outer", "tar")
    assert labels(found) == {"n01/1.png": 0}
    with Image.open(found[0][0]) as image:
        assert image.size == (16, 16)


@pytest.mark.parametrize("cut", [700, 1024 + 512])
def test_tar_files_that_are_cut_off_are_refused(cut, tmp_path):
    path = as_tar(write(tmp_path / "data", "a/1.png", "b/1.png"))
    path.write_bytes(path.read_bytes()[: 2048 + cut])
    with pytest.raises(papr_fx.ArgumentError, match="cannot read samples from .*data.tar"):
        opened(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [("a\nb\na\n", "lists 'a' twice"), ("a\n\nb\n", "line 2 is empty"), (None, "Cannot locate")],
    ids=["twice", "empty line", "missing"],
)
def test_class_maps_that_list_no_order(content, message, tmp_path):
    if content is not None:
        (tmp_path / "classes.txt").write_text(content)
    with pytest.raises(papr_fx.ArgumentError, match=f"--class-map .*{message}"):
        read_class_map(str(tmp_path / "classes.txt"))


@pytest.mark.parametrize("data", ["hfds/any", "wds/any"])
def test_orders_are_for_names(data):
    with pytest.raises(papr_fx.ArgumentError, match="numbers its own classes"):
        opened(data, order="torchvision")


def test_a_class_map_that_is_a_pickle_runs_nothing(tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "classes.pkl"
    path.write_bytes(pickle.dumps({"b": 0, "a": 1}))
    assert read_class_map(str(path)) == {"b": 0, "a": 1}
    for content, message in ((Code(), "found .*[.]mkdir, which is not loaded"), (["b"], "found list")):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(papr_fx.ArgumentError, match=f"--class-map .*: sought .*, {message}"):
            read_class_map(str(path))
    assert not (tmp_path / "ran").exists()
