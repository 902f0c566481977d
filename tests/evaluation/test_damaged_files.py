"""Files that are damaged, or made to do harm: each is refused by name, at once, in little memory. None runs code."""

import io
import json
import pickle
import signal
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import papr_fx
from papr_fx.evaluation import page
from papr_fx.evaluation.classes import read_class_map
from papr_fx.evaluation.counts import Counts, Progress
from papr_fx.evaluation.decoders import ClipDecoder, ImageDecoder, Views
from papr_fx.evaluation.results import part_of, read_part, write_part
from papr_fx.evaluation.samples import Samples
from papr_fx.evaluation.shards import ShardReader

from .pictures import Evil, noise, opened, read_all, write_tar

STATISTICS = ((0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def _in_time():
    """Ends a test that hangs."""

    def end(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def with_size(path, place, size):
    """Changes the size that a header of a tar file states."""
    content = bytearray(path.read_bytes())
    content[place + 124 : place + 136] = (256**12 + size).to_bytes(12, "big")
    content[place + 148 : place + 156] = b" " * 8
    content[place + 148 : place + 156] = b"%06o\0 " % sum(content[place : place + 512])
    path.write_bytes(content)


@pytest.mark.usefixtures("_in_time")
@pytest.mark.parametrize("size", [-512, -1024])
def test_sizes_that_lead_back(size, tmp_path):
    write_tar(tmp_path / "a.tar", [("a/0.png", noise(0)), ("b/1.png", noise(1))])
    second = 512 + (len(noise(0)) + 511) // 512 * 512
    with_size(tmp_path / "a.tar", second, size)
    with pytest.raises(papr_fx.ArgumentError, match=f"size of b/1.png leads back to byte {second + 512 + size}"):
        opened(str(tmp_path / "a.tar"))
    write_tar(tmp_path / "s-0.tar", [("0.png", noise(0)), ("1.cls", b"1")])
    with_size(tmp_path / "s-0.tar", second, size)
    found = read_all(ShardReader(str(tmp_path), "s-{0..0}.tar"))
    assert "the rest of the shard cannot be read: the size of 1.cls leads back" in found[-1].error


def test_a_class_that_fits_into_no_tensor(tmp_path):
    (tmp_path / "0.png").write_bytes(noise(0))
    (tmp_path / "t.csv").write_text(f"0.png,{10**30}\n0.png,2\n")
    first, second = read_all(opened(str(tmp_path / "t.csv")))
    assert f"it is of class {10**30}, and no model has so many" in first.error
    assert (second.label, second.error) == (2, "")


def test_info_of_another_kind(tmp_path):
    for content in ("[]", '{"splits": []}', '{"splits": {"val": null}}', "[" * 100_000):
        (tmp_path / "_info.json").write_text(content)
        with pytest.raises(papr_fx.ArgumentError):
            opened(f"wds/{tmp_path}", split="val")


def test_sides_that_are_too_unlike(tmp_path):
    file = io.BytesIO()
    Image.new("L", (5000, 1)).save(file, "png")

    def decode(source):
        return ImageDecoder(lambda image: torch.zeros(image.size))(source)

    with pytest.raises(papr_fx.ArgumentError, match=r"more than 100 times the other \(5000 and 1 pixels\): cut it"):
        decode(file)
    file = io.BytesIO()
    Image.new("L", (500, 5)).save(file, "png")
    assert decode(file).shape == (500, 5)
    frames = [Image.new("L", (1, 700), level) for level in (0, 255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(papr_fx.ArgumentError, match="more than 100 times the other"), (tmp_path / "a.gif").open("rb") as source:
        ClipDecoder(2, 8, STATISTICS, Views(1, 1, 1))(source)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pickle.dumps(Evil(Path("mark"))), "which is not loaded"),
        (b"}r\xff\xff\xff\xff.", "LONG_BINPUT says 4294967295, and the file has 7 bytes"),
        (b"\x80\x04\x95" + b"\xff" * 7 + b"\x0f}.", "FRAME says"),
        (b"\x80\x05\x96" + b"\xff" * 7 + b"\x0f}.", "bytearray8"),
        (pickle.dumps({"a": 0})[:-5], ""),
        (b"}a.", "pop|stack|underflow"),
        (b"", "pickle exhausted|Ran out|end of"),
        (pickle.dumps({"a": "b"}), "the number of 'a' is 'b'"),
        (pickle.dumps({"a": True}), "the number of 'a' is True"),
        (pickle.dumps([1]), "sought a dictionary"),
    ],
)
def test_class_maps_in_damaged_pickles(content, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.pkl").write_bytes(content)
    with pytest.raises(papr_fx.ArgumentError, match=f"--class-map c.pkl: (?s:.*)({reason})"):
        read_class_map("c.pkl")
    assert not Path("mark").exists()


def test_a_class_map_in_a_pickle(tmp_path):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "c.pkl").write_bytes(pickle.dumps({"a": 1, "b": 0}, protocol))
        assert read_class_map("c.pkl", str(tmp_path)) == {"a": 1, "b": 0}


def part(tmp_path, **changed):
    write_part(tmp_path / "a.json", Progress(8, 7, {"1": Counts(top1=3)}, [(2, "x")]), {"model": "a"})
    path = part_of(tmp_path / "a.json")
    whole = json.loads(path.read_text())
    path.write_text(
        json.dumps(
            {
                **whole,
                **{key: changed[key] for key in changed if key == "settings"},
                "progress": {**whole["progress"], **{key: changed[key] for key in changed if key != "settings"}},
            }
        )
    )
    return tmp_path / "a.json"


@pytest.mark.parametrize(
    "changed",
    [
        {"settings": []},
        {"settings": None},
        {"done": float("inf")},
        {"done": -1},
        {"done": 3},
        {"total": -1},
        {"counts": {"1": {"top1": "3"}}},
        {"counts": {"1": {"top9": 3}}},
        {"counts": []},
        {"failed": [3]},
        {"failed": [[]]},
    ],
)
def test_damaged_part_files(changed, tmp_path):
    assert read_part(part(tmp_path), {"model": "a"}).done == 8
    with pytest.raises(papr_fx.ArgumentError, match="a.json.part does not say how far a run has come .*: remove it"):
        read_part(part(tmp_path, **changed), {"model": "a"})


def test_a_part_file_that_nests_without_end(tmp_path):
    part_of(tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(papr_fx.ArgumentError, match="does not say how far.*RecursionError"):
        read_part(tmp_path / "a.json", {})


ROW = "| vit | vit_tiny | tokens | 1 | 17 -> 9 | proved | yes | yes |"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("| 1 |", "| one |", "ValueError"),
        ("tokens", "refused", "KeyError: 'proved'"),
        ("tokens", "token", "in mode 'token'"),
        ("## timm", "## tinm", "it is of 'tinm'"),
    ],
)
def test_damaged_pages(old, new, reason, tmp_path):
    (tmp_path / "p.md").write_text(f"## timm 1.0\n\n{ROW}\n")
    assert [row.architecture.name for row in page.load(tmp_path / "p.md")] == ["vit_tiny"]
    (tmp_path / "p.md").write_text(f"## timm 1.0\n\n{ROW}\n".replace(old, new))
    with pytest.raises(papr_fx.ArgumentError, match=f"the row of 'vit_tiny' is damaged.*{reason}.*without --columns"):
        page.load(tmp_path / "p.md")
    (tmp_path / "p.md").write_bytes(b"## timm\n\xff")
    with pytest.raises(papr_fx.ArgumentError, match=r"cannot read the table in .*p\.md"):
        page.load(tmp_path / "p.md")


def test_a_tar_file_in_itself(tmp_path):
    """Nested deeper than Python's calls."""
    content = noise(0)
    for name in ["a/0.png", *["a.tar"] * 1500]:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        content = member.tobuf() + content + bytes(-len(content) % 512 + 1024)
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(papr_fx.ArgumentError, match="cannot read samples"):
        opened(str(tmp_path / "a.tar"))


class Broken:
    """A reader whose class is no number."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return io.BytesIO(noise(0)), "x"

    def filename(self, index):
        return "0.png"


def test_a_class_that_is_no_number():
    assert Samples(Broken(), ImageDecoder(lambda image: torch.zeros(1)), (1,))[0].error.startswith("0.png: ValueError")
