"""Labelled samples by index, decoded for a model; a file that cannot be decoded becomes a sample with an error."""

from __future__ import annotations

import struct
import tarfile
from collections.abc import Callable, Sequence
from typing import IO, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import ArgumentError, PaprError

# What decoders raise for a file that holds no image.
_UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, TypeError, IndexError, struct.error),
    *(Image.DecompressionBombError, tarfile.TarError),
)


class Sample(NamedTuple):
    """One sample, before it is collated into a batch.

    Attributes:
        pixels: The model's input; zeros if the sample could not be read.
        label: Its class.
        number: Its index in the data.
        error: Why it could not be read; empty if it could.
    """

    pixels: Tensor
    label: int
    number: int  # not `index`, which is a method of tuples
    error: str


class Reader(Protocol):
    """Files and their classes by index, with the interface of timm's readers."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]: ...

    def filename(self, index: int) -> str:
        """The name of a file."""
        ...


class Samples(Dataset[Sample]):
    """Decoded files. A file that cannot be decoded is reported; timm's datasets would return another one in its place.

    Args:
        reader: The files.
        decode: Turns an open file into pixels.
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
                return Sample(self.decode(source), _class_number(label), index, "")
        except _UNREADABLE as error:
            reason = str(error) if isinstance(error, PaprError) else f"{type(error).__name__}: {error}"
            return Sample(torch.zeros(self.shape), -1, index, f"{self.name(index)}: {reason}")

    def name(self, index: int) -> str:
        """The file name of a sample, as the reader gives it."""
        return str(self.reader.filename(index))


def _class_number(label: int) -> int:
    """A class, or `ArgumentError` if it fits into no tensor."""
    if abs(number := int(label)) > torch.iinfo(torch.int32).max:
        raise ArgumentError(f"it is of class {number}, and no model has so many")
    return number
