"""Opens labelled files for evaluation: folders, tar files, tables, WebDataset shards and Hugging Face data sets."""

from __future__ import annotations

import pickle
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from timm.data import create_dataset

from ..errors import ArgumentError
from .classes import NATURAL, read_class_map
from .folders import ClassRules, FolderReader
from .image_file import IMAGE_SUFFIXES
from .samples import Reader
from .shards import ShardReader
from .tables import TableReader
from .trees import TRAIN_SPLITS, VALIDATION_SPLITS, Tree, folder_tree, split_name, tar_tree

# The default split, as in timm: other names for it count too, and a folder without splits is read as a whole.
DEFAULT_SPLIT = "validation"
_SPLITS = (*TRAIN_SPLITS, *VALIDATION_SPLITS, "test")


@dataclass(frozen=True)
class Source:
    """Where labelled files are.

    Attributes:
        data: A folder with one folder per class, or with splits that are such folders; a tar file of either; a `.csv` file of
            paths and classes; `wds/FOLDER`, WebDataset shards; or `hfds/NAME`, a Hugging Face data set.
        split: The split to read. Of a folder, the one of that name if there is one; of shards also their file names, such as
            `val-{00..07}.tar`.
        class_map: A file that lists classes in the model's order, as timm reads it.
        order: How folders are classes and are numbered, as in `ClassRules`; of a table, how names are numbered.
        data_dir: Cache folder of `hfds/`; folder of the shards if `wds/` names none; folder that the paths of a `.csv` file
            start from (default: its own folder).
        suffixes: Suffixes of the files to read (default: those of images).
        keys: `input_key` and `target_key` of `hfds/`, the columns of images and classes.
    """

    data: str
    split: str = DEFAULT_SPLIT
    class_map: str = ""
    order: str = NATURAL
    data_dir: str | None = None
    suffixes: Sequence[str] = ()
    keys: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def kind(self) -> str:
        """What comes before the first slash: `wds`, `hfds`, or part of a path."""
        return self.data.partition("/")[0]


def open_reader(source: Source) -> Reader:
    """Opens labelled files.

    Raises:
        ArgumentError: There is no such data, or part of it would be skipped.
    """
    data = source.data
    _check_source(source)
    try:
        if source.kind == "wds":
            return ShardReader(data.partition("/")[2] or source.data_dir or "", source.split)
        if data.endswith(".csv"):
            root = Path(source.data_dir or Path(data).parent)
            return TableReader(Path(data), root, source.class_map, source.order)
        return _hub_reader(source) if source.kind == "hfds" else _folder_reader(source)
    except ArgumentError:
        raise
    except ImportError as error:
        raise ArgumentError(f"{data} needs the hfds extra: pip install 'papr-fx[hfds]' ({error})") from error
    except (
        *(OSError, EOFError, RuntimeError, ValueError, AssertionError, LookupError, TypeError, AttributeError),
        *(tarfile.TarError, pickle.UnpicklingError),
    ) as error:
        raise ArgumentError(f"cannot read samples from {data}: {type(error).__name__}: {error}") from error


def _check_source(source: Source) -> None:
    """Refuses data that is not there, and options that its kind does not take."""
    data, kind = source.data, source.kind
    if source.keys and kind != "hfds":
        raise ArgumentError(f"--input-key and --target-key name columns of hfds/ data, not of {data}")
    if kind not in ("hfds", "wds") and not Path(data).exists():
        raise ArgumentError(
            f"there is no folder {data}: give one that holds a folder per class, or {source.split}/ with such folders"
        )
    if kind in ("hfds", "wds") and source.order != NATURAL:
        raise ArgumentError(f"--class-order numbers folders, and names in tables; {data} numbers its own classes")
    if kind == "wds" and source.class_map:
        raise ArgumentError("--class-map names folders; the classes of shards are numbers")
    if kind == "wds" and not find_spec("webdataset"):
        raise ArgumentError(f"{data} needs the eval extra: pip install 'papr-fx[eval]' (there is no webdataset)")


def _hub_reader(source: Source) -> Any:
    """Timm's reader of a Hugging Face data set."""
    classes = read_class_map(source.class_map) if source.class_map else ""
    options: dict[str, Any] = {"class_map": classes, **source.keys}
    dataset: Any = create_dataset(source.data, root=source.data_dir, split=source.split, **options)
    dataset.reader[0][0].close()  # a missing column shows only when a sample is read
    return dataset.reader


def _folder_reader(source: Source) -> FolderReader:
    """The reader of a folder or a tar file."""
    data = Path(source.data)
    rules = ClassRules(source.suffixes or IMAGE_SUFFIXES, source.order, source.class_map)
    if data.is_dir():
        split = split_name({path.name for path in data.iterdir() if path.is_dir()}, source.split)
        tree = folder_tree(data / split)
    elif data.suffix == ".tar":
        whole = tar_tree(data)
        split = split_name({path.parts[0] for path in whole.folders}, source.split)
        tree = whole.below(split) if split else whole
    else:
        raise ArgumentError(f"{data} is neither a folder nor a .tar or .csv file")
    if not split:
        _check_splits(source, tree)
    return FolderReader(tree, rules)


def _check_splits(source: Source, tree: Tree) -> None:
    """Refuses data without the split that was named, or with other splits only."""
    if source.split != DEFAULT_SPLIT:
        raise ArgumentError(f"{source.data} holds no {source.split}")
    holding = {path.parts[0] for path in tree.folders if len(path.parts) > 1}
    splits = [name for name in _SPLITS if name in holding]
    if splits:
        raise ArgumentError(f"{source.data} holds {', '.join(splits)}, and none to evaluate on: name one with --split")
