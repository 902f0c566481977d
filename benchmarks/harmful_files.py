"""Files that are made to do harm: code in pickles, bombs, sizes that lie, nesting without end."""

import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .mutations import png_chunk, tar_number, tar_summed

_SECOND = 512 + 1024  # where the second member of a tar file starts, behind 600 bytes of the first
MARK = "mark"  # the file that code in a file would make
Files = Mapping[str, bytes | Callable[[], bytes] | None]


class _Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._mark,)


def harmful(mark: Path) -> Iterator[tuple[str, str, Files]]:
    """Name of the kind, what is done, and the files: what makes a large one, and None for one that is to be missing.

    Args:
        mark: The file that code in a file would make.
    """
    yield from _code(mark)
    yield from _bombs()
    yield from _archives()
    deep = b"[" * 100_000 + b"]" * 100_000
    for kind, file in (
        ("part file", "r.json.part"),
        ("real labels", "l.json"),
        ("shards: _info.json", "_info.json"),
        ("timm's folder: config.json", "config.json"),
        ("transformers' folder: config.json", "config.json"),
        ("transformers' folder: preprocessor_config.json", "preprocessor_config.json"),
    ):
        yield kind, "deep nesting", {file: deep}
        yield kind, "no UTF-8", {file: b'{"a": "\xff\xfe"}'}
        yield kind, "empty", {file: b""}
        yield kind, "null", {file: b"null"}


def _code(mark: Path) -> Iterator[tuple[str, str, Files]]:
    evil = {"a": torch.zeros(1), "evil": _Evil(mark)}
    pickled = pickle.dumps(_Evil(mark))
    yield "checkpoint: pth", "code", {"a.pth": saved(evil)}
    yield "checkpoint: pth before torch 1.6", "code", {"a.pth": saved(evil, _use_new_zipfile_serialization=False)}
    yield "checkpoint: pth", "code, a plain pickle", {"a.pth": pickled}
    yield "checkpoint: npz", "code", {"a.npz": _npz(np.array([_Evil(mark)], dtype=object))}
    yield "class map: c.pkl", "code", {"c.pkl": pickled}
    for kind, file in (
        ("timm's folder: model.safetensors", "pytorch_model.bin"),
        ("transformers' folder: model.safetensors", "pytorch_model.bin"),
    ):
        yield kind, "code", {"model.safetensors": None, file: saved(evil)}
        yield kind, "code, a plain pickle", {"model.safetensors": None, file: pickled}
    script = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Config: pass\nclass Model: pass\n".encode()
    names = {"AutoConfig": "m.Config", "AutoModelForVideoClassification": "m.Model", "AutoImageProcessor": "m.Config"}
    for model_type in ("videomae", "unheard_of"):
        config = json.dumps({"model_type": model_type, "auto_map": names}).encode()
        yield "transformers' folder: config.json", f"code of its own, {model_type}", {"config.json": config, "m.py": script}
    config = json.dumps({"auto_map": names, "image_processor_type": "Unheard"}).encode()
    files = {"preprocessor_config.json": config, "m.py": script}
    yield "transformers' folder: preprocessor_config.json", "code of its own", files
    command = f"pipe:touch {mark}"
    split = {"name": "val", "num_samples": 4, "filenames": [command], "shard_lengths": [4]}
    yield "shards: _info.json", "a command", {"_info.json": json.dumps({"splits": {"val": split}}).encode()}


def saved(state: object, **options: Any) -> bytes:
    """What `torch.save` writes."""
    file = io.BytesIO()
    torch.save(state, file, **options)
    return file.getvalue()


def _npz(values: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, a=values)
    return file.getvalue()


def _bombs() -> Iterator[tuple[str, str, Files]]:
    for side in (12_000, 60_000):
        yield "image: png, RGB", f"bomb, {side} x {side}", {"a/0.png": partial(_large_png, side, side)}
    yield "image: png, RGB", "1 x 60000 pixels", {"a/0.png": partial(_large_png, 60_000, 1)}
    yield "clip: gif", "1 x 60000 pixels", {"a/0.gif": _large_gif(1, 60_000)}
    for kind, file, content in (
        ("table: csv", "t.csv", b"a/0.png,%d" % 10**30),
        ("shards: tar", "s-0.tar", _tar(_labelled)),
        ("class map: c.pkl", "c.pkl", pickle.dumps({"a": 10**30})),
    ):
        yield kind, "a class of 31 digits", {file: content}
    yield "image: png, RGB", "bomb in a comment", {"a/0.png": lambda: _large_png(8, 8, b"a\0\0" + zlib.compress(bytes(10**9)))}
    for kind, suffix, count in (("clip: gif", "gif", 2000), ("clip: webp", "webp", 2000)):
        yield kind, f"a single pixel, {count} frames", {f"a/0.{suffix}": partial(_many_frames, count, suffix)}
    yield "clip: gif", "65535 x 65535 pixels", {"a/0.gif": _large_gif(65535, 65535)}
    yield "clip: gif", "16000 x 16000 pixels", {"a/0.gif": _large_gif(16000, 16000)}
    yield "clip: webp", "16000 x 16000 pixels", {"a/0.webp": _large_webp(16000, 16000)}
    yield "checkpoint: pth", "bomb, 3.6 GB of zeros as pickle", {"a.pth": partial(_zip_bomb, "archive/data.pkl")}
    yield "checkpoint: pth", "bomb, 3.6 GB of zeros as weights", {"a.pth": partial(_zip_bomb, "archive/data/0")}
    yield "checkpoint: npz", "bomb, 3.6 GB of zeros", {"a.npz": partial(_zip_bomb, "embedding/kernel.npy", _npy(450_000_000))}
    yield "checkpoint: npz", "a header of 10^15 numbers", {"a.npz": _zipped("embedding/kernel.npy", _npy(10**15))}
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    yield "checkpoint: safetensors", "a header of 2^40 numbers", {"a.safetensors": struct.pack("<Q", len(header)) + header}
    yield "checkpoint: safetensors", "a header of 2^62 bytes", {"a.safetensors": struct.pack("<Q", 2**62) + header}


def _large_png(width: int, height: int, comment: bytes = b"") -> bytes:
    """A grey PNG file of one value."""
    lines = zlib.compressobj(9)
    packed = b"".join(lines.compress(bytes(width + 1)) for _ in range(height)) + lines.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"zTXt", comment), (b"IDAT", packed)]
    body = b"".join(png_chunk(*chunk) for chunk in chunks if chunk[1])
    return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")


def _many_frames(count: int, suffix: str) -> bytes:
    """An animation of a single pixel that changes."""
    file = io.BytesIO()
    frames = [Image.new("L", (1, 1), 255 * (number % 2)) for number in range(2)]
    if suffix == "gif":
        frames[0].save(file, "gif", save_all=True, append_images=frames[1:], duration=10)
        content = file.getvalue()
        start = content.index(b"\x21\xf9")
        return content[:start] + content[start:-1] * (count // 2) + content[-1:]
    frames[0].save(file, suffix, save_all=True, append_images=frames[1:] * (count // 2), duration=10)
    return file.getvalue()


def _large_gif(width: int, height: int) -> bytes:
    """An animation of two frames of a single pixel on a large screen."""
    content = bytearray(_many_frames(2, "gif"))
    content[6:10] = struct.pack("<HH", width, height)
    return bytes(content)


def _large_webp(width: int, height: int) -> bytes:
    content = bytearray(_many_frames(4, "webp"))
    start = content.index(b"VP8X") + 12  # behind flags
    content[start : start + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(content)


def _npy(count: int) -> bytes:
    """The header of an array of so many numbers."""
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({count},), }}"
    text = text.ljust(118 - 1) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def _zip_bomb(name: str, head: bytes = b"") -> bytes:
    """A zip file with one member of 3.6 GB, and what `torch.load` looks for beside it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open(name, "w", force_zip64=True) as member:
            member.write(head)
            for _ in range(3600):
                member.write(bytes(10**6))
        if name.endswith("/0"):
            state = io.BytesIO(saved({"a": torch.zeros(2 * 10**3)}))
            whole = zipfile.ZipFile(state)
            pickled = next(entry for entry in whole.namelist() if entry.endswith("data.pkl"))
            archive.writestr(
                "archive/data.pkl", whole.read(pickled).replace(b"M\xd0\x07", b"J" + struct.pack("<i", 900_000_000))
            )
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def _zipped(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


def _archives() -> Iterator[tuple[str, str, Files]]:
    for kind, file in (("tar file of folders", "t.tar"), ("shards: tar", "s-0.tar")):
        for number in (-512, -1024, -(2**40), 2**60):
            yield kind, f"a member of {number} bytes", {file: _tar(lambda info, n=number: None, size=number)}
        for name in ("../../etc/passwd.png", "/etc/passwd.png", "a/" * 2000 + "0.png", "a\0b/0.png", ""):
            yield kind, f"a member named {name[:20]!r}", {file: _tar(lambda info, n=name: setattr(info, "name", n))}
        for word, kind_of in (("link", tarfile.SYMTYPE), ("hard link", tarfile.LNKTYPE), ("device", tarfile.CHRTYPE)):
            yield kind, f"a {word}", {file: _tar(lambda info, k=kind_of: _linked(info, k))}
        yield kind, "only zeros", {file: bytes(10240)}
        yield kind, "shorter than a block", {file: b"a"}
    yield "tar file of folders", "tar files in tar files, 2000 deep", {"t.tar": partial(_nested, 2000)}
    yield "tar file of folders", "a tar file of 2^40 zeros in it", {"t.tar": _sparse()}


def _labelled(info: tarfile.TarInfo) -> None:
    info.name, info.size = "b/1.cls", 31


def _linked(info: tarfile.TarInfo, kind: bytes) -> None:
    info.type, info.linkname, info.size = kind, "/etc/passwd", 0


def _tar(change: Callable[[tarfile.TarInfo], object], size: int | None = None) -> bytes:
    """A tar file whose first member is changed, or the second has another size."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for place, name in enumerate(("a/0.png", "b/1.png")):
            info = tarfile.TarInfo(name)
            info.size = 600
            if not place:
                change(info)
            tar.addfile(info, io.BytesIO((b"%d" % 10**30).ljust(600, b"\0")) if info.size else None)
    content = file.getvalue()
    if size is None:
        return content
    header = bytearray(content[_SECOND : _SECOND + 512])
    header[124:136] = tar_number(size)
    return content[:_SECOND] + tar_summed(header) + content[_SECOND + 512 :]


def _nested(depth: int) -> bytes:
    """Tar files in one another."""
    content = _tar(lambda info: None)
    for _ in range(depth):
        info = tarfile.TarInfo("a.tar")
        info.size = len(content)
        content = info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512 + 1024)
    return content


def _sparse() -> bytes:
    """A tar file in which a `.tar` is said to be a sparse file of 2^40 bytes without content."""
    header = bytearray(tarfile.TarInfo("a.tar").tobuf(tarfile.GNU_FORMAT))
    header[156] = ord("S")
    header[386:398], header[398:410] = b"%011o\0" % 0, b"%011o\0" % 0
    header[483:495] = tar_number(2**40)
    return tar_summed(header) + bytes(1024)
