"""ImageNet's reassessed labels, read from a file."""

import argparse
import json

import pytest

import papr_fx
from papr_fx.cli.counting import _real_labels


class Names:
    def __len__(self):
        return 2

    def name(self, index):
        return f"folder/ILSVRC2012_val_{index + 1:08d}.JPEG"


def read(tmp_path, content):
    (tmp_path / "l.json").write_text(content)
    return _real_labels(argparse.Namespace(real_labels=str(tmp_path / "l.json")), Names())


def test_labels(tmp_path):
    allowed = read(tmp_path, json.dumps([[3, 4], []] + [[]] * 49_998))
    assert [allowed(0), allowed(1)] == [[3, 4], []]


@pytest.mark.parametrize(
    "content",
    [
        *("null", "3", "[]", "[" * 100_000, "{}"),
        json.dumps([3, []] + [[]] * 49_998),
        json.dumps([["a"], []] + [[]] * 49_998),
        json.dumps([None, []] + [[]] * 49_998),
    ],
    ids=["null", "number", "empty", "nested", "object", "numbers", "words", "none"],
)
def test_damaged_labels(content, tmp_path):
    with pytest.raises(papr_fx.ArgumentError, match="--real-labels: they are for the 50000 files"):
        read(tmp_path, content)
