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
from timm.data.readers.reader_image_folder import find_images_and_targets

from ..errors import ArgumentError
from .samples import Reader
from .shards import ShardReader
from .tables import TableReader

# timm's default split: timm also looks for `val` and the like, and reads a folder without splits as a whole.
DEFAULT_SPLIT = "validation"
_SPLITS = ("train", "training", "val", "valid", "validation", "eval", "evaluation", "test")


@dataclass(frozen=True)
class Source:
    """Where labelled files are.

    Attributes:
        data: A folder with one folder per class, or with splits that are such folders; a tar file of either; a `.csv` file of
            paths and classes; `wds/FOLDER`, WebDataset shards; or `hfds/NAME`, a Hugging Face data set.
        split: The split to read. Of a folder, the one of that name if there is one; of shards also their file names, such as
            `val-{00..07}.tar`.
        class_map: A file that lists classes in the model's order, as timm reads it.
        data_dir: Cache folder of `hfds/`; folder of the shards if `wds/` names none; folder that the paths of a `.csv` file
            start from (default: its own folder).
        suffixes: Suffixes of the files to read (default: those of images).
        keys: `input_key` and `target_key` of `hfds/`, the columns of images and classes.
    """

    data: str
    split: str = DEFAULT_SPLIT
    class_map: str = ""
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
            return TableReader(Path(data), Path(source.data_dir or Path(data).parent), source.class_map)
        reader = _timm_reader(source)
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
        _check_folder(source, Path(reader.root), reader.class_to_idx)
    return reader


def _check_source(source: Source) -> None:
    """Refuses data that is not there, and options that its kind does not take."""
    data, kind = source.data, source.kind
    if source.keys and kind != "hfds":
        raise ArgumentError(f"--input-key and --target-key name columns of hfds/ data, not of {data}")
    if kind not in ("hfds", "wds") and not Path(data).exists():
        raise ArgumentError(
            f"there is no folder {data}: give one that holds a folder per class, or {source.split}/ with such folders"
        )
    if kind == "wds" and source.class_map:
        raise ArgumentError("--class-map names folders; the classes of shards are numbers")
    if kind == "wds" and not find_spec("webdataset"):
        raise ArgumentError(f"{data} needs the eval extra: pip install 'papr-fx[eval]' (there is no webdataset)")


def _timm_reader(source: Source) -> Any:
    """Timm's reader of a folder, a tar file or a Hugging Face data set."""
    name, root = (source.data, source.data_dir) if source.kind == "hfds" else ("", source.data)
    options: dict[str, Any] = {"class_map": source.class_map, **source.keys}
    if source.suffixes:
        options["input_key"] = ";".join(source.suffixes)
    dataset: Any = create_dataset(name, root=root, split=source.split, **options)
    if source.kind == "hfds":
        dataset.reader[0][0].close()  # a missing column shows only when a sample is read
    return dataset.reader


def _check_folder(source: Source, root: Path, classes: Mapping[str, int]) -> None:
    """Refuses what timm would skip without a word: a missing split, and classes that the class map does not list."""
    data = Path(source.data)
    if root == data and source.split != DEFAULT_SPLIT:
        raise ArgumentError(f"{data} holds no {source.split}")
    splits = [name for name in _SPLITS if (data / name).is_dir() and any(inner.is_dir() for inner in (data / name).iterdir())]
    if root == data and splits:
        raise ArgumentError(f"{data} holds {', '.join(splits)}, and none to evaluate on: name one with --split")
    if source.class_map:
        _, found = find_images_and_targets(str(root), types=list(source.suffixes) or None)
        unknown = [name for name in found if name and name not in classes]
        if unknown:
            raise ArgumentError(
                f"{source.class_map} does not list {len(unknown)} of the classes in {root}, such as {unknown[0]}"
            )
