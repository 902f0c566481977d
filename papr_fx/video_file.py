"""Video files: reading all frames or the chosen ones, as they are to be shown, and writing."""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from .errors import ArgumentError


def read_video(path: str | Path | IO[bytes], *, frames: int | Callable[[int], Sequence[int]] | None = None) -> Tensor:
    """Decodes the first video stream in a file (needs the `video` extra: PyAV).

    Frames are turned as the file says they are to be shown, and transparent pixels are put over white. Memory is taken for
    the returned frames only.

    Args:
        path: A file that FFmpeg can read, by name or opened. Grey and other pixel formats become RGB.
        frames: Which frames are returned: a number of frames, evenly spaced from the first to the last; or a function that
            takes the number of frames in the file and returns the indices wanted, at least one, in any order. None returns
            all.

    Returns:
        (T, 3, H, W) uint8.

    Raises:
        ArgumentError: The file cannot be read, holds no video frame or too few, or PyAV is not installed.
    """

    def chosen(count: int) -> Sequence[int]:
        if callable(frames):
            return frames(count)
        return range(count) if frames is None else evenly_spread(count, frames)

    av = pyav()
    name = path if isinstance(path, str | Path) else getattr(path, "name", "memory")
    try:
        found = _animation(path, chosen)
        found = _video(path, chosen) if found is None else found
    except (av.FFmpegError, OSError, EOFError, _FramesError) as error:
        raise ArgumentError(f"cannot read a clip from {name}: {error}") from error
    if not len(found):
        raise ArgumentError("frames must choose at least one frame")
    return found.permute(0, 3, 1, 2)


class _FramesError(Exception):
    """What a video holds cannot be shown."""


# What PyAV and Pillow raise for a file that is damaged, besides what is an `OSError`.
_DAMAGED = (
    *(SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError, AssertionError),
    struct.error,
)
_LARGEST = 100_000_000  # pixels of a frame: a file of some bytes may claim more than memory holds


@contextmanager
def _reading() -> Generator[None]:
    """Raises `_FramesError` where the file is damaged. No code of the caller runs inside."""
    from PIL import Image

    try:
        yield
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        raise _FramesError(str(error) or type(error).__name__) from error


def _check_size(width: int, height: int) -> None:
    if width * height > _LARGEST:
        raise _FramesError(f"its frames have {width} x {height} pixels, more than {_LARGEST}: write smaller ones")


def _video(path: str | Path | IO[bytes], chosen: Callable[[int], Sequence[int]]) -> Tensor:
    """Frames (T, H, W, 3) that FFmpeg decodes."""
    count = _packets(path)
    try:
        wanted = chosen(count)
    except ArgumentError:  # too few packets: only decoding says how many frames they hold
        count, _ = _decoded(path, count, ())
        wanted = chosen(count)
    held, found = _decoded(path, count, wanted)
    if held != count:  # the packets said another number
        _, found = _decoded(path, held, chosen(held))
    return found


def _opened(path: str | Path | IO[bytes]) -> Any:
    """An FFmpeg container with a video stream, at its start."""
    if not isinstance(path, str | Path):
        path.seek(0)
    container = pyav().open(str(path) if isinstance(path, Path) else path)
    if not container.streams.video:
        container.close()
        raise _FramesError("it has no video stream")
    container.streams.video[0].thread_type = "AUTO"
    return container


def _packets(path: str | Path | IO[bytes]) -> int:
    """How many frames a file holds, as far as its packets say: nothing is decoded."""
    with _reading(), _opened(path) as container:
        return sum(1 for packet in container.demux(video=0) if packet.size and not packet.is_discard)


def _decoded(path: str | Path | IO[bytes], count: int, wanted: Sequence[int]) -> tuple[int, Tensor]:
    """Decodes a file that should hold `count` frames.

    Returns:
        How many frames it holds, and those at the indices `wanted`, (T, H, W, 3); meaningless if it holds another number.
    """
    _check_places(wanted, count)
    slots: dict[int, list[int]] = {}
    for slot, place in enumerate(wanted):
        slots.setdefault(place, []).append(slot)
    number, found = 0, torch.empty(0)
    with _reading(), _opened(path) as container:
        for number, frame in enumerate(container.decode(video=0), 1):
            for slot in slots.get(number - 1, ()):
                _check_size(frame.width, frame.height)
                pixels = _shown(frame)
                found = found if len(found) else pixels.new_empty((len(wanted), *pixels.shape))
                if pixels.shape != found.shape[1:]:
                    raise _FramesError("its frames differ in size")
                found[slot] = pixels
    if not number:
        raise _FramesError("it has no frames")
    return number, found


def _shown(frame: Any) -> Tensor:
    """A frame as it is to be shown, (H, W, 3) uint8: turned, transparent pixels over white."""
    if any(component.is_alpha for component in frame.format.components):
        pixels = _over_white(torch.from_numpy(frame.to_ndarray(format="rgba")))
    else:
        pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    data = frame.side_data.get("DISPLAYMATRIX")
    return pixels if data is None else _turned(pixels, struct.unpack("=9i", bytes(data)))


def _over_white(layer: Tensor) -> Tensor:
    """Puts (H, W, 4) uint8 over white: (H, W, 3) uint8."""
    alpha = layer[..., 3:] / 255
    return (layer[..., :3] * alpha + 255 * (1 - alpha)).round().to(torch.uint8)


def _animation(path: str | Path | IO[bytes], chosen: Callable[[int], Sequence[int]]) -> Tensor | None:
    """Frames (T, H, W, 3) of an animated WebP or AVIF file, of which FFmpeg reads no frame or one; None for other files."""
    with Path(path).open("rb") if isinstance(path, str | Path) else nullcontext(path) as file:
        file.seek(0)
        head = file.read(12)
        if (head[:4], head[8:]) != (b"RIFF", b"WEBP") and head[4:] != b"ftypavis":
            return None
        from PIL import Image

        with _reading():
            image: Any = Image.open(file)
            count = image.n_frames
        _check_size(image.width, image.height)
        wanted = chosen(count)
        _check_places(wanted, count)
        found: dict[int, Tensor] = {}
        with _reading():
            for place in sorted({*wanted}):
                image.seek(place)
                pixels = torch.frombuffer(bytearray(image.convert("RGBA").tobytes()), dtype=torch.uint8)
                found[place] = _over_white(pixels.view(image.height, image.width, 4))
    return torch.stack([found[place] for place in wanted]) if found else torch.empty(0)


def _check_places(wanted: Sequence[int], count: int) -> None:
    if not all(0 <= place < count for place in wanted):
        raise ArgumentError(f"frames must be indices from 0 to {count - 1}")


def _turned(pixels: Tensor, matrix: Sequence[int]) -> Tensor:
    """Turns and mirrors a frame (H, W, 3) by FFmpeg's display matrix (a, b, u, c, d, v, x, y, w).

    The pixel in column p and row q is shown in column a p + c q + x and row b p + d q + y.
    """
    a, b, _, c, d = matrix[:5]
    straight, across = min(abs(a), abs(d)), min(abs(b), abs(c))
    if 100 * min(straight, across) > max(straight, across) or not max(straight, across):
        raise _FramesError(
            "it is to be shown turned by an angle that is no multiple of 90 degrees: write it turned, such as by "
            "`ffmpeg -i in.mp4 out.mp4`"
        )
    if across > straight:
        pixels, columns, rows = pixels.transpose(0, 1), c, b
    else:
        columns, rows = a, d
    return pixels.flip([axis for axis, sign in ((0, rows), (1, columns)) if sign < 0])


def write_video(path: str | Path, frames: Tensor, *, rate: int = 8) -> None:
    """Writes frames (T, 3, H, W) in [0, 1] to a video file as H.264 (needs the `video` extra: PyAV).

    H.264 needs an even number of rows and columns: an odd last one is left out.

    Args:
        path: The file to write.
        frames: RGB, floating point.
        rate: Frames per second.

    Raises:
        ArgumentError: `frames` are not floating point, or PyAV is not installed.
    """
    if not frames.is_floating_point():
        raise ArgumentError(f"frames must be floating point in [0, 1], not {frames.dtype}: divide bytes by 255")
    av = pyav()
    even = frames[..., : frames.shape[-2] // 2 * 2, : frames.shape[-1] // 2 * 2]
    pixels = (even.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()  # (T, H, W, 3)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = pixels.shape[1], pixels.shape[2], "yuv420p"
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
        container.mux(stream.encode())


def pyav() -> Any:
    """Imports PyAV.

    Raises:
        ArgumentError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ArgumentError(f"videos need the video extra: pip install 'papr-fx[video]' ({error})") from error
    return av


def evenly_spread(count: int, frames: int) -> list[int]:
    """`frames` indices, evenly spaced over `count` frames."""
    if frames < 1:
        raise ArgumentError(f"frames must be at least 1, not {frames}")
    if count < frames:
        raise ArgumentError(f"the clip has {count} frames, too few: the model takes {frames}")
    return torch.linspace(0, count - 1, frames).round().long().tolist()
