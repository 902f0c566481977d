"""A kind of file that papr-fx reads."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

READ, REPORTED = "read", "reported"


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        name: In the table.
        file: The file that is damaged, from the folder.
        write: Writes the file, and what belongs to it, into a folder.
        read: Reads it: `READ`, or `REPORTED` where a sample is named as unreadable. Raises `PaprError` where it is refused.
    """

    name: str
    file: str
    write: Callable[[Path], object]
    read: Callable[[Path], str]
