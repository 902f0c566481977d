"""Videos: reading and writing files, cutting the views of multi-view inference, and averaging their scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ArgumentError
from .tracing.numerics import tensors_of
from .video_file import evenly_spread, pyav, read_video, write_video

__all__ = [
    "average_views",
    "clip_frames",
    "crop_views",
    "pyav",
    "read_video",
    "sample_frames",
    "sample_views",
    "write_video",
]


def sample_frames(video: Tensor, frames: int) -> Tensor:
    """Picks `frames` frames, evenly spaced over a video (T, C, H, W).

    Raises:
        ArgumentError: The video has fewer frames.
    """
    return video[evenly_spread(len(video), frames)]


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


def _spaced(end: int, count: int) -> list[int]:
    """`count` whole numbers, evenly spaced from 0 to `end`; for a count of 1, the middle."""
    if count == 1:
        return [end // 2]
    return [round(end * place / (count - 1)) for place in range(count)]
