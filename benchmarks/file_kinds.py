"""The kinds of files that papr-fx reads: a small whole one of each, and the call that reads it."""

import argparse
import json
import pickle
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from papr_fx.cli.counting import _real_labels
from papr_fx.evaluation import page
from papr_fx.evaluation.classes import read_class_map
from papr_fx.evaluation.counts import Counts, Progress
from papr_fx.evaluation.decoders import ClipDecoder, ImageDecoder, Views
from papr_fx.evaluation.image_file import is_animation, read_image
from papr_fx.evaluation.readers import Source, open_reader
from papr_fx.evaluation.results import part_of, read_part, write_part
from papr_fx.evaluation.samples import Reader, Samples
from papr_fx.evaluation.survey import Row
from papr_fx.evaluation.zoo import Architecture
from papr_fx.video import read_video, write_video

from .read_file import READ, REPORTED, Kind
from .weight_files import weights

SETTINGS = {"model": "a", "z": [1.0, 0.5]}
STATISTICS = ((0.5,) * 3, (0.5,) * 3)


def kinds() -> list[Kind]:
    """All kinds."""
    images = [_image(name, suffix, options) for name, suffix, options in _IMAGES]
    clips = [_clip(suffix) for suffix in ("mp4", "mkv", "avi", "ts", "gif", "webp")]
    return [*images, *clips, *weights(), *_listings()]


_IMAGES: Sequence[tuple[str, str, dict[str, Any]]] = (
    *(("RGB", suffix, {}) for suffix in ("png", "jpg", "webp", "bmp", "tiff", "ppm", "jp2", "avif")),
    ("P", "gif", {}),
    ("RGBA", "png", {}),
    ("I;16", "png", {}),
    ("F", "tiff", {}),
    ("L", "tiff", {"compression": "tiff_deflate"}),
)


def picture(mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A small picture."""
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (5, 6, 4), dtype=torch.uint8, generator=random).numpy()
    image = Image.fromarray(pixels).resize((40, 30), Image.Resampling.BILINEAR)
    return image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)


def outcome(reader: Reader, decode: Callable[[IO[bytes]], Tensor]) -> str:
    """Reads all samples."""
    samples = Samples(reader, decode, (1,))
    found = [(samples.name(index), samples[index]) for index in range(len(samples))]
    torch.tensor([sample.label for _, sample in found])  # as a batch holds them
    return REPORTED if any(sample.error for _, sample in found) else READ


def pixels(image: Image.Image) -> Tensor:
    """What a model takes of an image."""
    return cast(Any, create_transform((3, 224, 224), is_training=False))(image)


def _image(mode: str, suffix: str, options: dict[str, Any]) -> Kind:
    file = f"a/0.{suffix}"

    def write(folder: Path) -> None:
        (folder / "a").mkdir()
        picture(mode).save(folder / file, **options)

    def read(folder: Path) -> str:
        found = outcome(open_reader(Source(str(folder))), ImageDecoder(pixels))
        is_animation(folder / file)
        read_image(folder / file)
        return found

    return Kind(f"image: {suffix}, {mode}", file, write, read)


def _clip(suffix: str) -> Kind:
    file = f"a/0.{suffix}"

    def write(folder: Path) -> None:
        (folder / "a").mkdir()
        frames = [picture("RGB", seed) for seed in range(6)]
        if suffix in ("gif", "webp"):
            frames[0].save(folder / file, save_all=True, append_images=frames[1:], duration=100)
        else:
            values = torch.stack([torch.frombuffer(bytearray(f.tobytes()), dtype=torch.uint8).view(30, 40, 3) for f in frames])
            write_video(folder / file, values.permute(0, 3, 1, 2) / 255)

    def read(folder: Path) -> str:
        suffixes = (f".{suffix}",)
        found = outcome(open_reader(Source(str(folder), suffixes=suffixes)), ClipDecoder(4, 16, STATISTICS, Views(2, 1, 2)))
        is_animation(folder / file)
        read_video(folder / file, frames=3)
        read_video(folder / file)
        return found

    return Kind(f"clip: {suffix}", file, write, read)


def _listings() -> list[Kind]:
    """Files that list samples or classes, or hold them; and what earlier runs wrote."""

    def pictures(folder: Path) -> None:
        for number in range(4):
            path = folder / f"{'ab'[number % 2]}" / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            picture(seed=number).save(path)

    def table(folder: Path) -> None:
        pictures(folder)
        (folder / "t.csv").write_text("".join(f"{'ab'[number % 2]}/{number}.png,{number % 2}\n" for number in range(4)))

    def archive(folder: Path) -> None:
        pictures(folder)
        with tarfile.open(folder / "b" / "c.tar", "w") as inner:
            inner.add(folder / "a" / "0.png", "9.png")
        with tarfile.open(folder / "t.tar", "w") as tar:
            for name in ("a", "b/1.png", "b/3.png"):
                tar.add(folder / name, name)
            tar.add(folder / "b" / "c.tar", "c.tar")

    def shards(folder: Path) -> None:
        pictures(folder)
        for shard in range(2):
            with tarfile.open(folder / f"s-{shard}.tar", "w") as tar:
                for number in (shard, shard + 2):
                    (folder / "label").write_text(f"{number % 2}")
                    tar.add(folder / "ab"[number % 2] / f"{number}.png", f"{number}.png")
                    tar.add(folder / "label", f"{number}.cls")
        files = {"filenames": ["s-0.tar", "s-1.tar"], "shard_lengths": [2, 2]}
        split = {"name": "val", "num_samples": 4, **files}
        (folder / "_info.json").write_text(json.dumps({"splits": {"val": split}}))

    def samples(data: str, split: str = "") -> Callable[[Path], str]:
        def read(folder: Path) -> str:
            named = data.format(folder)
            return outcome(open_reader(Source(named, split=split) if split else Source(named)), ImageDecoder(pixels))

        return read

    def class_map(content: bytes, file: str) -> Kind:
        def read(folder: Path) -> str:
            read_class_map(str(folder / file))
            return READ

        return Kind(f"class map: {file}", file, lambda folder: (folder / file).write_bytes(content), read)

    return [
        Kind("table: csv", "t.csv", table, samples("{}/t.csv")),
        Kind("tar file of folders", "t.tar", archive, samples("{}/t.tar")),
        Kind("shards: tar", "s-0.tar", shards, samples("wds/{}", "s-{0..1}.tar")),
        Kind("shards: _info.json", "_info.json", shards, samples("wds/{}", "val")),
        class_map(b"a\nb\nc\n", "c.txt"),
        class_map(pickle.dumps({"a": 0, "b": 1}), "c.pkl"),
        Kind("part file", "r.json.part", _write_part, _read_part),
        Kind("page of a survey", "p.md", _write_page, _read_page),
        Kind("real labels", "l.json", _write_labels, _read_labels),
    ]


def _write_part(folder: Path) -> None:
    progress = Progress(8, 7, {"1": Counts(top1=3), "0.5": Counts(top1=2, wins=1)}, [(2, "a/2.png: it is empty")])
    write_part(folder / "r.json", progress, SETTINGS)


def _read_part(folder: Path) -> str:
    assert part_of(folder / "r.json").exists()
    found = read_part(folder / "r.json", SETTINGS)
    assert found is not None
    Progress().add(found)  # what a run does with it
    return READ


def _write_page(folder: Path) -> None:
    rows = [
        Row(Architecture("timm", "vit", "vit_tiny"), "tokens", "logits", 1, "17 -> 9", "proved", "", "yes", "yes"),
        Row(Architecture("timm", "vit", "vit_odd"), reason="it has no blocks"),
    ]
    (folder / "p.md").write_text(f"## timm 1.0\n\n{page.table(rows)}\n")


def _read_page(folder: Path) -> str:
    page.load(folder / "p.md")
    return READ


class _Names:
    """The names of samples, as `Samples` gives them."""

    def __len__(self) -> int:
        return 3

    def name(self, index: int) -> str:
        return f"n/ILSVRC2012_val_{index + 1:08d}.JPEG"


def _write_labels(folder: Path) -> None:
    (folder / "l.json").write_text(json.dumps([[number % 7] for number in range(3)] + [[]] * 49997))


def _read_labels(folder: Path) -> str:
    allowed = _real_labels(argparse.Namespace(real_labels=str(folder / "l.json")), cast(Any, _Names()))
    assert allowed is not None
    for index in range(3):  # what a run does with them
        assert isinstance(3 in allowed(index), bool)
        assert len(allowed(index)) >= 0
    return READ
