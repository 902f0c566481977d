"""Files of a folder or a tar file, each in the folder of its class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO

from timm.utils.misc import natural_key

from ..errors import ArgumentError
from .classes import NATURAL, TORCHVISION, numbered, order_note, read_class_map
from .trees import Tree, TreeFile

# Folders that systems and programs put beside a user's: they hold previews and metadata.
_NOT_THE_USERS = ("__MACOSX", "@eaDir", "__pycache__", "lost+found")


@dataclass(frozen=True)
class ClassRules:
    """How files get their classes.

    Attributes:
        suffixes: Suffixes of the files to read, in lower case.
        order: Which folder is a file's class, and how classes are numbered: "natural", the innermost folder, as in timm; or
            "torchvision", the outermost one.
        class_map: A file that lists classes in the model's order; else they are numbered in that order.
    """

    suffixes: Sequence[str]
    order: str = NATURAL
    class_map: str = ""

    def reads(self, path: PurePosixPath) -> bool:
        """Whether a file is to be read."""
        return path.suffix.lower() in self.suffixes

    def class_folder(self, path: PurePosixPath) -> PurePosixPath:
        """The folder that is a file's class."""
        return path.parent if self.order == NATURAL else PurePosixPath(path.parts[0])


class FolderReader:
    """Files of a folder or a tar file by index, each in the folder of its class.

    Attributes:
        class_to_idx: The number of each class; empty if the files are in no folders, and have class -1.
        notes: What was skipped, and how classes were numbered.

    Raises:
        ArgumentError: There are no files to read, or it is not clear which folders are classes.
    """

    def __init__(self, tree: Tree, rules: ClassRules) -> None:
        self.notes: list[str] = []
        self.class_to_idx: dict[str, int] = {}
        self._root = tree.root
        users = [file for file in tree.files if not _hidden(file.path)]
        found = [file for file in users if rules.reads(file.path)]
        if not found:
            raise ArgumentError(f"{tree.root} holds no files to read ({' '.join(rules.suffixes)}){_held(users)}")
        labelled = [file for file in found if len(file.path.parts) > 1]
        self._note_skipped(tree, rules, labelled)
        if labelled:
            self._check_folders(tree, rules, labelled)
            self.class_to_idx = self._numbers(rules, labelled)
        elif rules.class_map:
            raise ArgumentError(f"{rules.class_map} lists folders of classes, and {tree.root} holds files in none")
        else:
            self.notes.append(f"{tree.root} holds no folders of classes: only agreement with the dense model is counted")
        self._files = sorted(labelled or found, key=lambda file: (natural_key(str(file.path)), str(file.path)))
        self._labels = [self.class_to_idx[rules.class_folder(file.path).name] if labelled else -1 for file in self._files]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        return self._files[index].open(), self._labels[index]

    def filename(self, index: int) -> str:
        """The path of a file from the root."""
        return str(self._files[index].path)

    def _numbers(self, rules: ClassRules, labelled: Iterable[TreeFile]) -> dict[str, int]:
        names = {rules.class_folder(file.path).name for file in labelled}
        if not rules.class_map:
            classes = numbered(names, rules.order)
            self.notes.append(order_note(classes, rules.order))
            return classes
        classes = read_class_map(rules.class_map, self._root)
        unknown = sorted(name for name in names if name not in classes)
        if unknown:
            raise ArgumentError(
                f"{rules.class_map} does not list {len(unknown)} of the classes in {self._root}, such as {unknown[0]}"
            )
        return classes

    def _note_skipped(self, tree: Tree, rules: ClassRules, labelled: Sequence[TreeFile]) -> None:
        hidden = sorted({str(_hidden(file.path)) for file in tree.files if _hidden(file.path) and rules.reads(file.path)})
        if hidden:
            self.notes.append(f"skipped {len(hidden)} hidden files or folders, such as {hidden[0]}")
        others = [file.path for file in tree.files if not _hidden(file.path) and len(file.path.parts) > 1]
        others = [path for path in others if not rules.reads(path)]
        if others:
            self.notes.append(f"skipped {len(others)} files by their suffix: {_suffixes(others)}")
        loose = [file.path for file in tree.files if len(file.path.parts) == 1 and not _hidden(file.path)]
        loose = [path for path in loose if rules.reads(path)]
        if labelled and loose:
            self.notes.append(f"skipped {len(loose)} files that are in no folder of a class, such as {min(loose)}")

    def _check_folders(self, tree: Tree, rules: ClassRules, labelled: Iterable[TreeFile]) -> None:
        """Refuses folders of which it is not clear whether, or which, classes they are."""
        folders = sorted({rules.class_folder(file.path) for file in labelled})
        by_name: dict[str, PurePosixPath] = {}
        for folder in folders:
            outer = next((parent for parent in folder.parents if parent in folders), None)
            if outer is not None:
                raise ArgumentError(
                    f"{tree.root}: {outer} holds files and so does {folder}, so it is not clear which is the class: "
                    f"--class-order {TORCHVISION} takes the outer folder"
                )
            if (other := by_name.setdefault(folder.name, folder)) != folder:
                raise ArgumentError(
                    f"{tree.root}: {other} and {folder} would be one class: rename one, or take the outer folders as classes "
                    f"with --class-order {TORCHVISION}"
                )
        empty = _empty(tree, rules, folders)
        if empty and not rules.class_map:
            below = [file.path for file in tree.files if empty[0] in file.path.parents]
            raise ArgumentError(
                f"{tree.root}: {empty[0]} holds no files to read{_held_paths(below)}, and whether it is a class changes the "
                "numbers of others: fill or remove it, or list the classes with --class-map"
            )
        if empty:
            self.notes.append(f"skipped {len(empty)} folders without files to read, such as {empty[0]}")


def _empty(tree: Tree, rules: ClassRules, classes: Sequence[PurePosixPath]) -> list[PurePosixPath]:
    """Folders that could be classes, and hold no files to read."""
    known = {*classes} | {parent for folder in classes for parent in folder.parents}
    outside = [path for path in tree.folders if path not in known and not _hidden(path)]
    if rules.order == TORCHVISION:
        return [path for path in outside if len(path.parts) == 1]
    inside = {*classes}
    unread = [path for path in outside if inside.isdisjoint(path.parents)]
    holding = {parent for path in unread for parent in path.parents}
    return [path for path in unread if path not in holding]


def _hidden(path: PurePosixPath) -> PurePosixPath | None:
    """The part of a path that is hidden, or that a system made."""
    for place, name in enumerate(path.parts, 1):
        if name.startswith(".") or name in _NOT_THE_USERS:
            return PurePosixPath(*path.parts[:place])
    return None


def _held(files: Iterable[TreeFile]) -> str:
    return _held_paths([file.path for file in files])


def _held_paths(paths: Sequence[PurePosixPath]) -> str:
    return f", but {_suffixes(paths)}" if paths else ""


def _suffixes(paths: Iterable[PurePosixPath]) -> str:
    """How many files there are of each suffix."""
    counts: Mapping[str, int] = Counter(path.suffix.lower() or "without suffix" for path in paths)
    shown = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5]
    return ", ".join(f"{count} {suffix}" for suffix, count in shown)
