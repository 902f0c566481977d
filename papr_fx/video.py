"""Clips from video files and of arrays: decoding, the views of multi-view inference, and their averaged scores."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ArgumentError
from .tracing.numerics import tensors_of


def read_video(path: str | Path | IO[bytes]) -> Tensor:
    """Decodes all frames of a video file's first video stream (needs the `video` extra: PyAV).

    Args:
        path: Any file that FFmpeg reads, by name or opened. Grey and other pixel formats become RGB.

    Returns:
        (T, 3, H, W) uint8.

    Raises:
        ArgumentError: The file cannot be read, holds no video, or no frame; or PyAV is not installed.
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
    """Writes frames (T, 3, H, W) in [0, 1] to a video file, H.264 in `.mp4` (needs the `video` extra: PyAV).

    H.264 takes sides of an even number of pixels: an odd last row or column is left out.

    Args:
        path: The file to write.
        frames: RGB, floating point.
        rate: Frames a second.

    Raises:
        ArgumentError: `frames` are whole numbers.
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
    """Picks `frames` frames evenly from all of a video (T, C, H, W).

    Raises:
        ArgumentError: It has fewer.
    """
    if len(video) < frames:
        raise ArgumentError(f"the clip has {len(video)} frames, too few: the model takes {frames}")
    return video[torch.linspace(0, len(video) - 1, frames).round().long()]


def sample_views(video: Tensor, frames: int, *, step: int = 4, size: int = 224, temporal: int = 5, spatial: int = 3) -> Tensor:
    """Cuts a video into the views of multi-view inference (PaPr, Sec. 4: 5 clips x 3 crops for VideoMAE).

    Args:
        video: (T, C, H, W): floating point, or bytes, which become floating point in [0, 1].
        frames: Frames of a view.
        step: Take every `step`-th frame.
        size: Side of a view in pixels: the shorter side is resized to it, bilinear with antialiasing.
        temporal: Clips, evenly spaced from the first frames to the last.
        spatial: Crops, evenly spaced along the longer side; the centre where it is 1.

    Returns:
        (temporal * spatial, frames, C, size, size), the crops of each clip in turn.

    Raises:
        ArgumentError: The video has fewer frames than a view spans.
    """
    if not video.is_floating_point() and video.dtype != torch.uint8:
        raise ArgumentError(f"the video must be floating point or bytes, not {video.dtype}")
    if min(frames, step, size, temporal, spatial) < 1:
        raise ArgumentError("frames, step, size, temporal and spatial must be 1 at least")
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
    """Class probabilities of a clip: the mean over its views.

    Args:
        model: A video classifier, dense or transformed, whose first output tensor are the logits (B, classes).
        views: (V, T, C, H, W), normalised as the model expects them; see `sample_views`.
        layout: What the model takes: "BTCHW" (transformers) or "BCTHW" (torchvision, pytorchvideo).
        batch_size: Views run at once.

    Returns:
        (classes,), summing to 1.

    Raises:
        ArgumentError: `layout` is another word.
    """
    if layout not in ("BTCHW", "BCTHW"):
        raise ArgumentError(f"layout must be 'BTCHW' or 'BCTHW', not {layout!r}")
    clips = views if layout == "BTCHW" else views.transpose(1, 2)
    scores = [tensors_of(model(some))[0].softmax(dim=-1) for some in clips.split(batch_size)]
    return torch.cat(scores).mean(dim=0)


def pyav() -> Any:
    """PyAV's module.

    Raises:
        ArgumentError: It is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ArgumentError(f"videos need the video extra: pip install 'papr-fx[video]' ({error})") from error
    return av


def _spaced(end: int, count: int) -> list[int]:
    """`count` whole numbers evenly from 0 to `end`; half of it where there is one."""
    if count == 1:
        return [end // 2]
    return [round(end * place / (count - 1)) for place in range(count)]
