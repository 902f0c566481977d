"""Videos: reading and writing files, cutting the views of multi-view inference, and averaging their scores."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ArgumentError
from .tracing.numerics import tensors_of


def read_video(path: str | Path | IO[bytes]) -> Tensor:
    """Decodes all frames of the first video stream in a file (needs the `video` extra: PyAV).

    Args:
        path: A file that FFmpeg can read, by name or opened. Grey and other pixel formats become RGB.

    Returns:
        (T, 3, H, W) uint8.

    Raises:
        ArgumentError: The file cannot be read or holds no video frame, or PyAV is not installed.
    """
    av = pyav()
    source, path = (str(path), path) if isinstance(path, str | Path) else (path, getattr(path, "name", "memory"))
    try:
        with av.open(source) as container:
            if not container.streams.video:
                raise ArgumentError(f"cannot read a clip from {path}: it has no video stream")
            frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    except (av.FFmpegError, OSError) as error:
        raise ArgumentError(f"cannot read a clip from {path}: {error}") from error
    if not frames:
        raise ArgumentError(f"cannot read a clip from {path}: it has no frames")
    if any(frame.shape != frames[0].shape for frame in frames):
        raise ArgumentError(f"cannot read a clip from {path}: its frames differ in size")
    return torch.stack(frames).permute(0, 3, 1, 2)


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
    if len(video) < frames:
        raise ArgumentError(f"the clip has {len(video)} frames, too few: the model takes {frames}")
    return video[torch.linspace(0, len(video) - 1, frames).round().long()]


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
    if not video.is_floating_point() and video.dtype != torch.uint8:
        raise ArgumentError(f"the video must be floating point or uint8, not {video.dtype}")
    if min(frames, step, size, temporal, spatial) < 1:
        raise ArgumentError("frames, step, size, temporal and spatial must be at least 1")
    span = (frames - 1) * step + 1
    if len(video) < span:
        raise ArgumentError(f"the clip has {len(video)} frames, too few: {frames} with a step of {step} span {span}")
    height, width = video.shape[-2:]
    scale = size / min(height, width)
    sides = round(height * scale), round(width * scale)
    longer = -2 if sides[0] > sides[1] else -1
    views: list[Tensor] = []
    for start in _spaced(len(video) - span, temporal):
        picked = video[start : start + span : step]
        picked = picked if picked.is_floating_point() else picked / 255
        clip = F.interpolate(picked, size=sides, mode="bilinear", align_corners=False, antialias=True)  # (frames, C, h, w)
        views += [clip.narrow(longer, offset, size) for offset in _spaced(max(sides) - size, spatial)]
    return torch.stack(views)


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


def _spaced(end: int, count: int) -> list[int]:
    """`count` whole numbers, evenly spaced from 0 to `end`; for a count of 1, the middle."""
    if count == 1:
        return [end // 2]
    return [round(end * place / (count - 1)) for place in range(count)]
