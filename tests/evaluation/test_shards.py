"""WebDataset shards: read by index, equal to timm's stream; damaged ones are reported."""

import pytest
import torch

from papr_fx.evaluation.shards import ShardReader

from .pictures import LEFT_OPEN, expected, noise, opened, read_all, to_tensor, write_tar


@pytest.mark.parametrize("split", ["validation", "set-val-{0..1}.tar"])
def test_shards(shards, split):
    found = read_all(opened(f"wds/{shards}", split=split))
    assert [sample.label for sample in found] == [i % 3 for i in range(10)]
    assert all(torch.equal(sample.pixels, expected(i)) for i, sample in enumerate(found))
    assert not any(sample.error for sample in found)
    assert opened("wds/", data_dir=str(shards)).filename(7) == "set-val-1.tar:a/0007"


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning", LEFT_OPEN)
def test_shards_as_timm_reads_them(shards):
    """Its stream holds the same images and classes, in one process."""
    from timm.data import create_dataset

    stream = create_dataset("wds/", root=str(shards), split="validation")
    for ours, (image, label) in zip(read_all(opened(f"wds/{shards}")), stream, strict=True):
        assert ours.label == label
        assert torch.equal(ours.pixels, to_tensor(image))


def test_damaged_shards(shards):
    files = [("0.png", noise(0)), ("0.cls", b"0"), ("1.cls", b"1"), ("2.png", noise(2)), ("3.png", noise(3)), ("3.cls", b"x")]
    write_tar(shards / "bad.tar", [*files, ("4.png", b"none"), ("4.cls", b"1")])
    found = read_all(ShardReader(str(shards), "bad.tar"))
    assert [sample.error.split(": ")[-1] for sample in found[:4]] == [
        "",
        "there is no image among its files (cls)",
        "it has no class (.cls)",
        "b'x'",
    ]
    assert found[4].error == "bad.tar:4: cannot read an image from memory: it holds text"
    whole = (shards / "set-val-0.tar").read_bytes()
    (shards / "cut.tar").write_bytes(whole[: 4 * 2048 + 700])
    cut = read_all(ShardReader(str(shards), "cut.tar"))
    assert "cut.tar:its end: ValueError: the rest of the shard cannot be read: it is cut off" in cut[-1].error
    assert torch.equal(cut[0].pixels, expected(0))
    assert cut[0].label == 0
    write_tar(shards / "twice.tar", [("0.png", noise(0)), ("0.cls", b"0"), ("0.png", noise(1))])
    first, again = read_all(ShardReader(str(shards), "twice.tar"))
    assert torch.equal(first.pixels, expected(0))
    assert "holds 0.png twice" in again.error
    files = [("0.png", noise(0)), ("0.cls", b"0")]
    write_tar(shards / "both.tar", [*files, *files])
    assert len(read_all(ShardReader(str(shards), "both.tar"))) == 2
    (shards / "none.tar").write_bytes(b"none")
    (none,) = read_all(ShardReader(str(shards), "none.tar"))
    assert "the rest of the shard cannot be read" in none.error
