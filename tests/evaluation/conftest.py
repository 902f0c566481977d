"""Folders and shards of noise images."""

import json

import pytest

from .pictures import noise, write_tar


@pytest.fixture
def shards(tmp_path):
    """Two shards of five samples in three classes, as timm names them."""
    for shard in range(2):
        numbers = range(5 * shard, 5 * shard + 5)
        files = [(f"a/{i:04d}.{ending}", content) for i in numbers for ending, content in sample_files(i)]
        write_tar(tmp_path / f"set-val-{shard}.tar", files)
    names = ["set-val-0.tar", "set-val-1.tar"]
    split = {"name": "validation", "num_samples": 10, "filenames": names, "shard_lengths": [5, 5]}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"validation": split}}))
    return tmp_path


def sample_files(number):
    return [("png", noise(number)), ("cls", str(number % 3).encode()), ("json", b"{}")]


@pytest.fixture
def folder(tmp_path):
    for i in range(9):
        path = tmp_path / "images" / "validation" / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise(i))
    return tmp_path / "images"
