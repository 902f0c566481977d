"""The data of `eval` and `tune`, as their options name it: what is said about classes, and what ends the run."""

from types import SimpleNamespace

import pytest
from PIL import Image

from papr_fx.cli.data import samples_of
from papr_fx.cli.main import _parser, main
from papr_fx.evaluation.decoders import ImageDecoder

from ..labelled import MODEL


@pytest.fixture
def folder(tmp_path):
    for name in ("2/a.webp", "10/a.BMP", ".hidden/a.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    return tmp_path


def subject(classes):
    return SimpleNamespace(suffixes=(), classes=classes, decode=ImageDecoder(lambda image: image.size), shape=())


@pytest.mark.parametrize(("order", "labels"), [((), [0, 1]), (("--class-order", "torchvision"), [1, 0])])
def test_the_order_of_classes_is_said(folder, order, labels, capsys):
    data = samples_of(_parser().parse_args(["eval", str(folder), *order]), subject(2))
    assert [data[index].label for index in range(2)] == labels
    said = capsys.readouterr().err
    assert "note: skipped 1 hidden files or folders, such as .hidden" in said
    assert f"note: 2 classes in {order[1] if order else 'natural'} order: 0 = " in said
    assert "the data has" not in said


def test_an_empty_folder_ends_the_run(folder, capsys):
    (folder / "5").mkdir()
    assert main(["tune", str(folder), *MODEL, "--max-drop", "0.1"]) == 2
    assert "5 holds no files to read, and whether it is a class changes the numbers of others" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", str(folder), "--class-order", "alphabetical"])
    assert "argument --class-order: invalid choice: 'alphabetical'" in capsys.readouterr().err
