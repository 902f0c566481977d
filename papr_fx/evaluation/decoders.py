"""From an open file to pixels: an image, or the normalised views of a video."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..proposals.statistics import Statistics
from ..video import clip_frames, crop_views, read_video
from .image_file import read_image

_LONGEST = 100  # sides
VIDEO_SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"),
)


@dataclass(frozen=True)
class Views:
    """Which views of a video are evaluated (PaPr, Sec. 4: 5 clips x 3 crops).

    Attributes:
        temporal: Clips per video.
        spatial: Crops per clip.
        step: Use every `step`-th frame.
    """

    temporal: int = 5
    spatial: int = 3
    step: int = 4


@dataclass(frozen=True)
class ImageDecoder:
    """Decodes an image file to pixels (3, H, W), with a transform of PIL images."""

    transform: Callable[[Any], Tensor]

    def __call__(self, source: IO[bytes]) -> Tensor:
        image = read_image(source)
        _check_shape(*image.size)
        return self.transform(image)


@dataclass(frozen=True)
class ClipDecoder:
    """Decodes a video file to normalised views (V, T, C, H, W).

    Only the frames that the views use are kept. A video that is shorter than one view is padded with its last frame.

    Attributes:
        frames: Frames per view.
        size: Side of a view in pixels.
        statistics: Mean and standard deviation of pixels in [0, 1].
        views: Which views are cut from the video.
    """

    frames: int
    size: int
    statistics: Statistics
    views: Views = Views()

    def __call__(self, source: IO[bytes]) -> Tensor:
        temporal, step = self.views.temporal, self.views.step
        span = (self.frames - 1) * step + 1

        def chosen(count: int) -> list[int]:
            clips = clip_frames(max(count, span), self.frames, step=step, temporal=temporal)
            return [min(place, count - 1) for clip in clips for place in clip]

        frames = read_video(source, frames=chosen)
        _check_shape(*frames.shape[-2:])
        clips = frames.split(self.frames)
        views = torch.cat([crop_views(clip, self.size, self.views.spatial) for clip in clips])
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in self.statistics)
        return (views - mean) / std


def _check_shape(side: int, other: int) -> None:
    """Refuses what is so long that it would fill the memory once its shorter side has the length that a model takes."""
    if max(side, other) > _LONGEST * min(side, other):
        raise ArgumentError(f"one side is more than {_LONGEST} times the other ({side} and {other} pixels): cut it")
