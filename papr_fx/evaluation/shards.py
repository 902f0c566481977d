"""Samples of WebDataset shards, by index.

timm reads shards as a stream, and several processes cannot each take an exact share of a stream. So the samples of a shard are
listed first and then read by their index.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import ArgumentError
from .image_file import IMAGE_SUFFIXES
from .trees import check_end, members_of

_SUFFIXES = ("jpg", "png", "webp", *(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES))  # timm's come first


@dataclass(frozen=True)
class _Member:
    """Where a shard holds the image of one sample, and its class; or why the sample cannot be read."""

    shard: str
    key: str
    start: int = 0
    size: int = 0
    label: int = -1
    error: str = ""


class ShardReader:
    """Samples of WebDataset shards, by index: an image, and its class as a number in a `.cls` file.

    Args:
        root: Folder of the shards. It holds timm's `_info.json` if `split` is the name of a split.
        split: A split that `_info.json` lists, or shards such as `val-{00..07}.tar`.

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
        self._members = [member for name in names for member in _members(self.root / name)]
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
        """The shard, and the sample's key in it."""
        member = self._members[index]
        return f"{member.shard}:{member.key}"


def _members(shard: Path) -> list[_Member]:
    """The samples of a shard. The files of one sample share their name up to the first dot."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    repeated: dict[str, _Member] = {}
    with shard.open("rb") as file:
        listed, damage = _listed(file)
        for key, suffix, member in listed:
            first = samples.setdefault(key, {}).setdefault(suffix, member)
            if first is not member:
                repeated.setdefault(key, _Member(shard.name, key, error=f"the shard holds {member.name} twice"))
        found = [_member(shard.name, key, files, file) for key, files in samples.items()]
    ends = [_Member(shard.name, "its end", error=damage)] if damage else []
    return [*found, *repeated.values(), *ends]


def _listed(shard: IO[bytes]) -> tuple[list[tuple[str, str, tarfile.TarInfo]], str]:
    """Key, suffix and place of each file, as far as the shard can be read; and why it cannot be read further."""
    listed: list[tuple[str, str, tarfile.TarInfo]] = []
    try:
        for file in _files(shard):
            listed.append(file)
    except (tarfile.TarError, EOFError) as error:
        return listed, f"the rest of the shard cannot be read: {error}"
    return listed, ""


def _files(shard: IO[bytes]) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key and suffix of each file."""
    with tarfile.open(fileobj=shard, mode="r:") as tar:
        for member in members_of(tar):
            folder, _, name = member.name.rpartition("/")
            base, _, suffix = name.partition(".")
            if member.isfile() and base:
                yield f"{folder}/{base}" if folder else base, suffix.lower(), member
    check_end(shard)


def _member(shard: str, key: str, files: Mapping[str, tarfile.TarInfo], file: IO[bytes]) -> _Member:
    image = next((files[suffix] for suffix in _SUFFIXES if suffix in files), None)
    if image is None:
        return _Member(shard, key, error=f"there is no image among its files ({', '.join(files)})")
    if "cls" not in files:
        return _Member(shard, key, error="it has no class (.cls)")
    file.seek(files["cls"].offset_data)
    label = file.read(files["cls"].size)
    try:
        return _Member(shard, key, image.offset_data, image.size, int(label))
    except ValueError:
        return _Member(shard, key, error=f"its class is not a number (.cls): {label[:20]!r}")
