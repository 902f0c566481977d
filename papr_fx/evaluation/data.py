"""Labelled images and clips for evaluation, by number: from folders, WebDataset shards and Hugging Face data sets.

timm reads folders and Hugging Face data sets. Shards it reads as streams, of which several processes cannot each take their
exact share, so that here a shard's samples are listed first and then read by number.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import torch
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils.misc import natural_key
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import ArgumentError
from ..proposals.statistics import Statistics
from ..video import read_video, sample_views

_USUAL = "validation"  # as timm names it: it also looks for `val` and the like, and takes a folder without splits whole
_SPLITS = ("train", "training", "val", "valid", "validation", "eval", "evaluation", "test")
VIDEO_SUFFIXES = (".avi", ".gif", ".mkv", ".mov", ".mp4", ".mpg", ".mpeg", ".webm")
# What decoders raise for files that hold no image.
_UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, TypeError, IndexError, struct.error),
    *(Image.DecompressionBombError, tarfile.TarError),
)


class Sample(NamedTuple):
    """One sample as it is collated.

    Attributes:
        pixels: What the model takes; zeros where the sample could not be read.
        label: Its class.
        place: Its place in the data.
        error: Why it could not be read; empty if it could.
    """

    pixels: Tensor
    label: int
    place: int
    error: str


class Reader(Protocol):
    """Files and their classes, by number, as timm's readers give them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]: ...

    def filename(self, index: int) -> str:
        """Names a file."""
        ...


class Samples(Dataset[Sample]):
    """Decoded files; one that cannot be decoded is told of, not replaced by the next one.

    Args:
        reader: The files.
        decode: A file to pixels.
        shape: Shape of the pixels.
    """

    def __init__(self, reader: Reader, decode: Callable[[IO[bytes]], Tensor], shape: Sequence[int]) -> None:
        self.reader = reader
        self.decode = decode
        self.shape = tuple(shape)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Sample:
        try:
            source, label, *_ = self.reader[index]
            with source:
                return Sample(self.decode(source), int(label), index, "")
        except _UNREADABLE as error:
            return Sample(torch.zeros(self.shape), -1, index, f"{self.name(index)}: {type(error).__name__}: {error}")

    def name(self, index: int) -> str:
        """The file of a sample, as the reader names it."""
        return str(self.reader.filename(index))


@dataclass(frozen=True)
class ImageDecoder:
    """Makes pixels (3, H, W) of an image file, by a transform of PIL images."""

    transform: Callable[[Any], Tensor]

    def __call__(self, source: IO[bytes]) -> Tensor:
        with Image.open(source) as opened:
            return self.transform(opened.convert("RGB"))


@dataclass(frozen=True)
class ClipDecoder:
    """Makes normalised views (V, T, C, H, W) of a video file.

    A video that is shorter than a view stands still at its end.

    Attributes:
        frames: Frames of a view.
        size: Side of a view in pixels.
        statistics: Mean and standard deviation of pixels in [0, 1].
        step: Every how manyth frame is taken.
        temporal: Clips of a video.
        spatial: Crops of a clip.
    """

    frames: int
    size: int
    statistics: Statistics
    step: int = 4
    temporal: int = 5
    spatial: int = 3

    def __call__(self, source: IO[bytes]) -> Tensor:
        video = read_video(source)  # (T, 3, H, W)
        missing = (self.frames - 1) * self.step + 1 - len(video)
        if missing > 0:
            video = torch.cat([video, video[-1:].expand(missing, -1, -1, -1)])
        views = sample_views(video, self.frames, step=self.step, size=self.size, temporal=self.temporal, spatial=self.spatial)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in self.statistics)
        return (views - mean) / std


def open_reader(
    data: str,
    *,
    split: str = _USUAL,
    class_map: str = "",
    data_dir: str | None = None,
    suffixes: Sequence[str] = (),
    keys: Mapping[str, str] | None = None,
) -> Reader:
    """Finds labelled files.

    Args:
        data: A folder that holds a folder a class, or splits of such; a tar file of such; a `.csv` file of paths and classes;
            `wds/FOLDER`, WebDataset shards; or `hfds/NAME`, a Hugging Face data set.
        split: Of folders, the folder to take where there is one; of shards also their names, such as `val-{00..07}.tar`.
        class_map: A file that lists classes in the model's order, as timm reads it.
        data_dir: Where `hfds/` keeps its cache; the folder of `wds/` if that names none; what paths in a `.csv` file are
            relative to, if not to its folder.
        suffixes: Endings of files to take; default: those of images.
        keys: `input_key` and `target_key` of `hfds/`, the columns of images and classes.

    Raises:
        ArgumentError: There is no such data, or not all of it would be taken.
    """
    kind, _, rest = data.partition("/")
    if keys and kind != "hfds":
        raise ArgumentError(f"--input-key and --target-key name columns of hfds/ data, not of {data}")
    if kind not in ("hfds", "wds") and not Path(data).exists():
        raise ArgumentError(f"there is no folder {data}; it holds a folder a class, or {split}/ with such")
    if kind == "wds" and class_map:
        raise ArgumentError("--class-map names folders; the classes of shards are numbers")
    if kind == "wds" and not find_spec("webdataset"):
        raise ArgumentError(f"{data} needs the eval extra: pip install 'papr-fx[eval]' (there is no webdataset)")
    try:
        if kind == "wds":
            return Shards(rest or data_dir or "", split)
        if data.endswith(".csv"):
            return Listed(Path(data), Path(data_dir or Path(data).parent), class_map)
        name, root = (data, data_dir) if kind == "hfds" else ("", data)
        options: dict[str, Any] = {"class_map": class_map, **(keys or {})}
        if suffixes:
            options["input_key"] = ";".join(suffixes)
        found: Any = create_dataset(name, root=root, split=split, **options)
        if kind == "hfds":
            found.reader[0][0].close()  # columns that are not there show when one is read
    except ArgumentError:
        raise
    except ImportError as error:
        raise ArgumentError(f"{data} needs the hfds extra: pip install 'papr-fx[hfds]' ({error})") from error
    except (
        *(OSError, RuntimeError, ValueError, AssertionError, KeyError, TypeError),
        *(tarfile.TarError, pickle.UnpicklingError),
    ) as error:
        raise ArgumentError(f"cannot read samples from {data}: {type(error).__name__}: {error}") from error
    if Path(data).is_dir():
        _check_folder(Path(data), Path(found.reader.root), split, class_map, found.reader.class_to_idx, suffixes)
    return found.reader


def _check_folder(
    data: Path, root: Path, split: str, class_map: str, classes: Mapping[str, int], suffixes: Sequence[str]
) -> None:
    """Refuses what timm passes over in silence: a split that is not there, and classes that no map lists."""
    if root == data and split != _USUAL:
        raise ArgumentError(f"{data} holds no {split}")
    splits = [name for name in _SPLITS if (data / name).is_dir() and any(inner.is_dir() for inner in (data / name).iterdir())]
    if root == data and splits:
        raise ArgumentError(f"{data} holds {', '.join(splits)}, and none to evaluate on: name one as --split")
    if class_map:
        _, there = find_images_and_targets(str(root), types=list(suffixes) or None)
        unknown = [name for name in there if name and name not in classes]
        if unknown:
            raise ArgumentError(f"{class_map} does not list {len(unknown)} of the classes in {root}, such as {unknown[0]}")


class Listed:
    """Files that a table lists, by number: a line holds a path and a class, with a comma or a space between.

    Args:
        table: The file, without a header.
        root: What relative paths are relative to.
        class_map: A file that lists classes in the model's order; without, names of classes are numbered in order, and
            numbers are taken as they are.

    Raises:
        ArgumentError: A line is none, or of a class that `class_map` does not list.
    """

    def __init__(self, table: Path, root: Path, class_map: str = "") -> None:
        with table.open(newline="") as file:
            split = [line.strip().rsplit("," if "," in line else None, 1) for line in file if line.strip()]
        lines = [[part.strip() for part in line] for line in split]
        wrong = next((number for number, line in enumerate(lines, 1) if len(line) != 2), 0)
        if wrong or not lines:
            where = f", line {wrong}" if wrong else ""
            raise ArgumentError(f"{table}{where}: a line is a path and a class, such as `clips/a.mp4,3`")
        names = sorted({label for _, label in lines}, key=natural_key)
        numbers = [name for name in names if re.fullmatch(r"-?\d+", name)]
        if 0 < len(numbers) < len(names) and not class_map:
            other = next(name for name in names if name not in numbers)
            raise ArgumentError(f"{table}: classes are numbers or names, not both: {numbers[0]} and {other!r} (a header?)")
        if class_map:
            classes: dict[str, int] = load_class_map(class_map)
        else:
            classes = {name: int(name) if numbers else place for place, name in enumerate(names)}
        unknown = [name for name in names if name not in classes]
        if unknown:
            raise ArgumentError(f"{table}: {class_map} does not list the class {unknown[0]!r}")
        self._files = [(root / path, classes[label]) for path, label in lines]
        if not self._files[0][0].exists():
            raise ArgumentError(f"{table}, line 1: there is no file {self._files[0][0]} (a header? a table has none)")
        self.class_to_idx = {} if numbers else classes

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        path, label = self._files[index]
        return path.open("rb"), label

    def filename(self, index: int) -> str:
        """The path."""
        return str(self._files[index][0])


@dataclass(frozen=True)
class _Member:
    """Where a shard holds the file of one sample, and its class; or why it holds none."""

    shard: str
    key: str
    start: int = 0
    size: int = 0
    label: int = -1
    error: str = ""


class Shards:
    """Samples of WebDataset shards, by number: an image, and its class as a number in a `.cls` file.

    Args:
        root: Folder of the shards, with timm's `_info.json` if `split` is a name.
        split: A split that this names, or shards such as `val-{00..07}.tar`.

    Raises:
        OSError: There is no such shard.
        ArgumentError: There is no such split, or the shards are empty.
    """

    def __init__(self, root: str, split: str) -> None:
        from timm.data.readers.reader_wds import ReaderWds

        self.root = Path(root)
        try:
            found: Any = ReaderWds(root, split=split)
        except RuntimeError as error:
            raise ArgumentError(f"{error}; without an _info.json, name the shards: --split 'val-{{00..07}}.tar'") from error
        names: Sequence[str] = found.split_info.filenames
        self._members = [member for name in names for member in _members(self.root / name, found.input_key.split(";"))]
        if not self._members:
            raise ArgumentError(f"there are no samples in {', '.join(names)} of {root}")

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        member = self._members[index]
        if member.error:
            raise ValueError(member.error)
        with (self.root / member.shard).open("rb") as shard:
            shard.seek(member.start)
            return io.BytesIO(shard.read(member.size)), member.label

    def filename(self, index: int) -> str:
        """The shard and the sample's key in it."""
        member = self._members[index]
        return f"{member.shard}:{member.key}"


def _members(shard: Path, endings: Sequence[str]) -> list[_Member]:
    """The samples of a shard, whose files differ in what follows the first dot of their names."""
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    again: dict[str, _Member] = {}
    ends: list[_Member] = []
    with shard.open("rb") as file:
        try:
            for key, ending, member in _files(file):
                files = found.setdefault(key, {})
                if ending in files:
                    again.setdefault(key, _Member(shard.name, key, error=f"the shard holds {member.name} twice"))
                else:
                    files[ending] = member
        except (tarfile.TarError, EOFError) as error:
            ends.append(_Member(shard.name, "its end", error=f"the shard cannot be read so far: {error}"))
        return [*(_member(shard.name, key, files, file, endings) for key, files in found.items()), *again.values(), *ends]


def _files(shard: IO[bytes]) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key and ending of each file."""
    with tarfile.open(fileobj=shard, mode="r:") as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            base, _, ending = name.partition(".")
            if member.isfile() and base:
                yield f"{folder}/{base}" if folder else base, ending.lower(), member
    shard.seek(-tarfile.BLOCKSIZE, io.SEEK_END)
    if any(shard.read()):  # a tar file ends with zeros; where it is cut in a header, tarfile stops in silence
        raise EOFError("it is cut off")


def _member(shard: str, key: str, files: Mapping[str, tarfile.TarInfo], file: IO[bytes], endings: Sequence[str]) -> _Member:
    image = next((files[ending] for ending in endings if ending in files), None)
    if image is None:
        return _Member(shard, key, error=f"there is no image ({', '.join(endings)})")
    if "cls" not in files:
        return _Member(shard, key, error="it has no class (.cls)")
    file.seek(files["cls"].offset_data)
    label = file.read(files["cls"].size)
    try:
        return _Member(shard, key, image.offset_data, image.size, int(label))
    except ValueError:
        return _Member(shard, key, error=f"its class is no number (.cls): {label[:20]!r}")
