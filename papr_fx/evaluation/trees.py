"""What a folder or a tar file holds: files and folders, by their path from its root."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, NoReturn

TRAIN_SPLITS = ("train", "training")
VALIDATION_SPLITS = ("val", "valid", "validation", "eval", "evaluation")


@dataclass(frozen=True)
class TreeFile:
    """One file.

    Attributes:
        path: From the root.
        place: The file on disk, or the tar file that holds it.
        start: Where it starts in the tar file, in bytes.
        size: Its size in the tar file, in bytes; -1 if it is on disk.
    """

    path: PurePosixPath
    place: Path
    start: int = 0
    size: int = -1

    def open(self) -> IO[bytes]:
        """Opens the file to read."""
        if self.size < 0:
            return self.place.open("rb")
        with self.place.open("rb") as archive:
            archive.seek(self.start)
            return io.BytesIO(archive.read(self.size))


@dataclass(frozen=True)
class Tree:
    """A folder or a tar file.

    Attributes:
        root: Its name.
        files: All files.
        folders: All folders, without the root.
    """

    root: str
    files: list[TreeFile]
    folders: list[PurePosixPath]

    def below(self, name: str) -> Tree:
        """The tree of one folder in the root."""
        files = [
            TreeFile(file.path.relative_to(name), file.place, file.start, file.size)
            for file in self.files
            if file.path.parts[0] == name and len(file.path.parts) > 1
        ]
        return Tree(
            f"{self.root}/{name}", files, [path.relative_to(name) for path in self.folders if path.parts[0] == name][1:]
        )


def split_name(names: set[str], split: str) -> str:
    """Which of the folders `names` holds a split: the one of its name, or of another name for it, as in timm; else ""."""
    alike = next((group for group in (TRAIN_SPLITS, VALIDATION_SPLITS) if split in group), ())
    return next((name for name in (split, *alike) if name in names), "")


def folder_tree(root: Path) -> Tree:
    """Lists a folder; links are followed.

    Raises:
        OSError: A folder in it cannot be read.
    """
    files: list[TreeFile] = []
    folders: list[PurePosixPath] = []
    for folder, inner, names in os.walk(root, followlinks=True, onerror=_fail):
        here = PurePosixPath(Path(folder).relative_to(root).as_posix())
        folders += [here / name for name in inner]
        files += [TreeFile(here / name, Path(folder, name)) for name in names]
    return Tree(str(root), files, sorted(folders))


def _fail(error: OSError) -> NoReturn:
    raise error


def tar_tree(path: Path) -> Tree:
    """Lists a tar file, and the tar files in it as folders.

    Raises:
        OSError: It cannot be read.
        tarfile.TarError: It is no tar file, or is cut off.
        EOFError: It is cut off.
    """
    with path.open("rb") as archive:
        found = [*_members(archive, PurePosixPath(), 0)]
    files = [TreeFile(name, path, start, size) for name, start, size in found if size >= 0]
    folders = {name for name, _, size in found if size < 0 and name.parts}
    folders |= {folder for file in files for folder in file.path.parents if folder.parts}
    return Tree(str(path), files, sorted(folders))


def _members(archive: IO[bytes], folder: PurePosixPath, offset: int) -> Iterator[tuple[PurePosixPath, int, int]]:
    """Path, start and size of each file; the size of a folder is -1."""
    with tarfile.open(fileobj=archive, mode="r:") as tar:
        for member in members_of(tar):
            path = folder / PurePosixPath(member.name)
            inner = tar.extractfile(member) if member.isfile() and path.suffix.lower() == ".tar" else None
            if inner is not None:
                yield from _members(inner, path.with_suffix(""), offset + member.offset_data)
            elif member.isfile() or member.isdir():
                yield path, offset + member.offset_data, member.size if member.isfile() else -1
    check_end(archive)


def check_end(archive: IO[bytes]) -> None:
    """Refuses a tar file that is cut off inside a header: there `tarfile` stops without an error.

    Raises:
        EOFError: The file does not end with zeros.
    """
    archive.seek(-tarfile.BLOCKSIZE, io.SEEK_END)
    if any(archive.read()):
        raise EOFError("it is cut off")


def members_of(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file that is read.

    Raises:
        tarfile.ReadError: The next one would not lie behind this one, as its size is negative: older releases of Python would
            go round in circles.
    """
    for member in tar:
        if tar.offset <= member.offset:
            raise tarfile.ReadError(f"the size of {member.name} leads back to byte {tar.offset}")
        yield member
