"""Videos: reading and writing files, cutting the views of multi-view inference, and averaging their scores."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ArgumentError
from .tracing.numerics import tensors_of


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
        return range(count) if frames is None else _spread(count, frames)

    av = pyav()
    name = path if isinstance(path, str | Path) else getattr(path, "name", "memory")
    try:
        count = _packets(path)
        try:
            wanted = chosen(count)
        except ArgumentError:  # too few packets: only decoding says how many frames they hold
            count, _ = _decoded(path, count, ())
            wanted = chosen(count)
        held, found = _decoded(path, count, wanted)
        if held != count:  # the packets said another number
            _, found = _decoded(path, held, chosen(held))
    except (av.FFmpegError, OSError, _FramesError) as error:
        raise ArgumentError(f"cannot read a clip from {name}: {error}") from error
    if not len(found):
        raise ArgumentError("frames must choose at least one frame")
    return found.permute(0, 3, 1, 2)


class _FramesError(Exception):
    """What a video holds cannot be shown."""


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
    with _opened(path) as container:
        return sum(1 for packet in container.demux(video=0) if packet.size and not packet.is_discard)


def _decoded(path: str | Path | IO[bytes], count: int, wanted: Sequence[int]) -> tuple[int, Tensor]:
    """Decodes a file that should hold `count` frames.

    Returns:
        How many frames it holds, and those at the indices `wanted`, (T, H, W, 3); meaningless if it holds another number.
    """
    if not all(0 <= place < count for place in wanted):
        raise ArgumentError(f"frames must be indices from 0 to {count - 1}")
    slots: dict[int, list[int]] = {}
    for slot, place in enumerate(wanted):
        slots.setdefault(place, []).append(slot)
    number, found = 0, torch.empty(0)
    with _opened(path) as container:
        for number, frame in enumerate(container.decode(video=0), 1):
            for slot in slots.get(number - 1, ()):
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
        layer = torch.from_numpy(frame.to_ndarray(format="rgba")).float()
        alpha = layer[..., 3:] / 255
        pixels = (layer[..., :3] * alpha + 255 * (1 - alpha)).round().to(torch.uint8)
    else:
        pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    data = frame.side_data.get("DISPLAYMATRIX")
    return pixels if data is None else _turned(pixels, struct.unpack("=9i", bytes(data)))


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


def sample_frames(video: Tensor, frames: int) -> Tensor:
    """Picks `frames` frames, evenly spaced over a video (T, C, H, W).

    Raises:
        ArgumentError: The video has fewer frames.
    """
    return video[_spread(len(video), frames)]


def sample_views(video: Tensor, frames: int, *, step: int = 4, size: int = 224, temporal: int = 5, spatial: int = 3) -> Tensor:
    """Cuts a video into the views of multi-view inference (PaPr, Sec. 4: 5 clips x 3 crops for VideoMAE).

    Args:
        video: (T, C, H, W), floating point or uint8; uint8 becomes floating point in [0, 1].
        frames: Frames per view.
        step: Use every `step`-th frame.
        size: Side of a view in pixels; the shorter side of the video is resized to it, bilinear with antialiasing.
        temporal: Clips per video, evenly spaced from the first frame to the last.
        spatial: Crops per clip, evenly spaced along the longer side; one crop is taken from the centre.

    Returns:
        (temporal * spatial, frames, C, size, size), clip by clip.

    Raises:
        ArgumentError: The video is too short for one view or of another dtype, or a number is below 1.
    """
    if spatial < 1 or size < 1:
        raise ArgumentError("size and spatial must be at least 1")
    clips = clip_frames(len(video), frames, step=step, temporal=temporal)
    return torch.cat([crop_views(video[clip], size, spatial) for clip in clips])


def clip_frames(length: int, frames: int, *, step: int, temporal: int) -> list[list[int]]:
    """Which frames `sample_views` takes of a video of `length` frames: one list of indices per clip.

    Raises:
        ArgumentError: The video is too short for one view, or a number is below 1.
    """
    if min(frames, step, temporal) < 1:
        raise ArgumentError("frames, step and temporal must be at least 1")
    span = (frames - 1) * step + 1
    if length < span:
        raise ArgumentError(f"the clip has {length} frames, too few: {frames} with a step of {step} span {span}")
    return [list(range(start, start + span, step)) for start in _spaced(length - span, temporal)]


def crop_views(clip: Tensor, size: int, spatial: int) -> Tensor:
    """Resizes and crops the frames of one clip as `sample_views` does.

    Args:
        clip: (frames, C, H, W), floating point or uint8.
        size: Side of a view in pixels.
        spatial: Crops per clip.

    Returns:
        (spatial, frames, C, size, size), floating point.

    Raises:
        ArgumentError: The clip is of another dtype.
    """
    if not clip.is_floating_point() and clip.dtype != torch.uint8:
        raise ArgumentError(f"the video must be floating point or uint8, not {clip.dtype}")
    height, width = clip.shape[-2:]
    scale = size / min(height, width)
    sides = round(height * scale), round(width * scale)
    longer = -2 if sides[0] > sides[1] else -1
    clip = clip if clip.is_floating_point() else clip / 255
    clip = F.interpolate(clip, size=sides, mode="bilinear", align_corners=False, antialias=True)  # (frames, C, h, w)
    return torch.stack([clip.narrow(longer, offset, size) for offset in _spaced(max(sides) - size, spatial)])


@torch.no_grad()
def average_views(model: nn.Module, views: Tensor, *, layout: str = "BTCHW", batch_size: int = 1) -> Tensor:
    """Class probabilities of a video, averaged over its views.

    Args:
        model: A video classifier, dense or transformed; its first output tensor holds the logits (B, classes).
        views: (V, T, C, H, W), normalised as the model expects them; see `sample_views`.
        layout: Layout of the model's input: "BTCHW" (transformers) or "BCTHW" (torchvision, pytorchvideo).
        batch_size: Views per batch.

    Returns:
        (classes,); they sum to 1.

    Raises:
        ArgumentError: `layout` is neither.
    """
    if layout not in ("BTCHW", "BCTHW"):
        raise ArgumentError(f"layout must be 'BTCHW' or 'BCTHW', not {layout!r}")
    clips = views if layout == "BTCHW" else views.transpose(1, 2)
    scores = [tensors_of(model(batch))[0].softmax(dim=-1) for batch in clips.split(batch_size)]
    return torch.cat(scores).mean(dim=0)


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


def _spread(count: int, frames: int) -> list[int]:
    """`frames` indices, evenly spaced over `count` frames."""
    if frames < 1:
        raise ArgumentError(f"frames must be at least 1, not {frames}")
    if count < frames:
        raise ArgumentError(f"the clip has {count} frames, too few: the model takes {frames}")
    return torch.linspace(0, count - 1, frames).round().long().tolist()


def _spaced(end: int, count: int) -> list[int]:
    """`count` whole numbers, evenly spaced from 0 to `end`; for a count of 1, the middle."""
    if count == 1:
        return [end // 2]
    return [round(end * place / (count - 1)) for place in range(count)]
