"""The data that `eval`, `tune` and `reproduce` read, as their options name it."""

from __future__ import annotations

import argparse
import sys

from ..evaluation.readers import Source, open_reader
from ..evaluation.samples import Samples
from ..evaluation.subject import Subject
from .distributed import is_first


def samples_of(arguments: argparse.Namespace, subject: Subject) -> Samples:
    """The data, decoded for a model."""
    source = Source(
        arguments.data,
        split=arguments.split,
        class_map=arguments.class_map,
        order=arguments.class_order,
        data_dir=arguments.data_dir,
        suffixes=subject.suffixes,
        keys={key: vars(arguments)[key] for key in ("input_key", "target_key") if vars(arguments)[key]},
    )
    reader = open_reader(source)
    for note in getattr(reader, "notes", ()) if is_first() else ():
        print(f"note: {note}", file=sys.stderr)
    classes = len(getattr(reader, "class_to_idx", ()))
    if classes and subject.classes and classes != subject.classes and is_first():
        print(
            f"note: the data has {classes} classes and the model {subject.classes}; --class-map FILE says which are which",
            file=sys.stderr,
        )
    return Samples(reader, subject.decode, subject.shape)


def batch_size(arguments: argparse.Namespace, subject: Subject) -> int:
    """Samples per batch of one process."""
    return arguments.batch_size or (2 if subject.views else 64)


def kind_of(subject: Subject) -> str:
    """What the samples are called."""
    return "videos" if subject.views else "images"
