"""Tables of paths and classes."""

import pytest
import torch

import papr_fx

from .pictures import expected, noise, opened, read_all


@pytest.mark.parametrize("between", [",", " "])
def test_tables_of_paths(folder, tmp_path, between):
    def table(*lines):
        path = folder / "table.csv"
        path.write_text("".join(f"{between.join(line)}\n" for line in lines))
        return str(path)

    files = ("validation/class1/4.png", "validation/class0/0.png", "validation/class0/none.png")
    spaced = table((files[0], " 5"), (files[1], "7 "))
    assert [s.label for s in read_all(opened(spaced))] == [5, 7]
    found = read_all(opened(table(*zip(files, "201", strict=True))))
    assert [sample.label for sample in found] == [2, 0, -1]
    assert torch.equal(found[0].pixels, expected(4))
    assert "none.png: FileNotFoundError" in found[2].error
    assert [s.label for s in read_all(opened(table((files[0], "b"), (files[1], "a"))))] == [1, 0]
    classes = tmp_path / "classes.txt"
    classes.write_text("b\na\n7\n")
    assert read_all(opened(table((files[0], "7"), (files[1], "a")), class_map=str(classes)))[0].label == 2
    assert [s.label for s in read_all(opened(table((files[0], "b"), (files[1], "a")), class_map=str(classes)))] == [0, 1]
    with pytest.raises(papr_fx.ArgumentError, match="does not list the class 'c'"):
        opened(table((files[0], "c")), class_map=str(classes))
    assert [s.label for s in read_all(opened(table((files[0], "-1"), (files[1], "10"))))] == [-1, 10]
    with pytest.raises(papr_fx.ArgumentError, match="numbers or names, not both: 3 and 'label'"):
        opened(table(("path", "label"), (files[0], "3")))
    with pytest.raises(papr_fx.ArgumentError, match="line 1: there is no file .*path"):
        opened(table(("path", "label"), (files[0], "a")))
    with pytest.raises(papr_fx.ArgumentError, match="table.csv: a line is a path"):
        opened(table())
    with pytest.raises(papr_fx.ArgumentError, match="line 2: a line is a path and a class"):
        opened(table((files[0], "1"), (files[1],)))
    (folder / "a b.png").write_bytes(noise(4))
    assert torch.equal(read_all(opened(table(("a b.png", "1"))))[0].pixels, expected(4))
    moved = read_all(opened(table((files[0].removeprefix("validation/"), "1")), data_dir=str(folder / "validation")))
    assert torch.equal(moved[0].pixels, expected(4))


def test_orders_of_names(folder):
    files = ("validation/class1/4.png", "validation/class0/0.png", "validation/class0/0.png")
    (folder / "table.csv").write_text("".join(f"{file},{name}\n" for file, name in zip(files, ("c2", "c10", "B"), strict=True)))
    found = opened(str(folder / "table.csv"))
    assert [sample.label for sample in read_all(found)] == [1, 2, 0]
    assert found.notes == [
        "3 classes in natural order: 0 = B, 1 = c2, 2 = c10; --class-order torchvision numbers them otherwise"
    ]
    assert [sample.label for sample in read_all(opened(str(folder / "table.csv"), order="torchvision"))] == [2, 1, 0]


def test_a_table_that_a_spreadsheet_wrote(folder):
    (folder / "table.csv").write_text("validation/class1/4.png,3\r\n", encoding="utf-8-sig")
    assert [sample.label for sample in read_all(opened(str(folder / "table.csv")))] == [3]
    (folder / "table.csv").write_bytes(b"validation/cl\xe4ss1/4.png,3\n")
    with pytest.raises(papr_fx.ArgumentError, match="cannot read samples from .*utf-8"):
        opened(str(folder / "table.csv"))
