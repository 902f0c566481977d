"""`papr-fx show` and `demo --clip`: the map and the kept tubelets of a clip, as one picture and as an annotated clip."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from ..errors import ArgumentError
from ..evaluation.models import VIDEO_MODELS, proposal_for, video_model
from ..ops.positions import resize_map
from ..planning import inputs
from ..planning.module import PrunedModule, set_keep_ratio
from ..queries import significance
from ..review.diff import graph_diff
from ..review.report import report
from ..transform import transform
from ..video import read_video, sample_views, write_video
from .kept import kept_levels, title


def demo_clip(arguments: argparse.Namespace) -> None:
    """Prunes a video transformer on a clip that scikit-image ships: table, pictures and graph diff."""
    from skimage import data

    _resolve_model(arguments)
    source = Path(data.__file__).parent / "no_time_for_that_tiny.gif"
    print("clip: an animation of 24 frames, from scikit-image")
    _show(arguments, source)


def show_clip(arguments: argparse.Namespace, path: Path) -> None:
    """Draws what a video classifier keeps of a video file."""
    _resolve_model(arguments)
    _show(arguments, path)


def _resolve_model(arguments: argparse.Namespace) -> None:
    """Fills in the default model, and refuses an option that only timm's models take."""
    if arguments.checkpoint:
        raise ArgumentError("--checkpoint is read by timm: for clips give --model the folder of a video model")
    arguments.model = arguments.model or next(iter(VIDEO_MODELS))


def _show(arguments: argparse.Namespace, path: Path) -> None:
    """Prunes a video classifier on a video file, and draws `--out` with an annotated clip beside it."""
    named = video_model(arguments.model, pretrained=arguments.pretrained)
    model = named.model
    example = inputs.example_images(model, None)  # (1, T, C, H, W)
    frames, size = example.shape[1], example.shape[-1]
    shown = shown_frames(read_video(path, frames=frames), size)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in named.statistics)
    clips = ((shown - mean) / std).unsqueeze(0)  # (1, T, C, H, W)
    proposal, statistics = proposal_for(named.statistics, arguments.proposal, pretrained=arguments.pretrained)
    gm = transform(model, proposal, arguments.z[0], input_stats=statistics, background=arguments.background)
    weights = ", random weights" if arguments.model in VIDEO_MODELS else ""
    print(f"model: {arguments.model}{weights}\nproposal: {arguments.proposal}\n")
    rows: list[tuple[object, ...]] = []
    kept: dict[str, Tensor] = {}
    for z in arguments.z:
        set_keep_ratio(gm, z)
        found = report(gm)
        (level,) = kept_levels(gm, clips).values()
        kept[title(z, level[0])] = level[0]
        site = found.sites[0]
        rows.append((z, f"{site.dense} -> {site.kept}", found.dense_macs / 1e9, found.total_macs / 1e9))
    headers = ["z", "positions", "GMACs dense", "GMACs with proposal"]
    print(tabulate(rows, headers=headers, floatfmt=("g", "", ".1f", ".1f"), tablefmt="github"))
    _draw(arguments.out, gm, clips, shown, kept)
    print(f"\nwhat changed in the graph at z={arguments.z[-1]:g}:\n{graph_diff(model, gm)}")


def shown_frames(video: Tensor, size: int) -> Tensor:
    """The centres of all frames (T, C, H, W) of a video, as the one view (T, C, size, size) in [0, 1] that is shown."""
    return sample_views(video, len(video), step=1, size=size, temporal=1, spatial=1)[0]


def _draw(out: Path, gm: PrunedModule, clips: Tensor, frames: Tensor, kept: dict[str, Tensor]) -> None:
    """Writes the picture, and beside it the clip with its kept tubelets lit."""
    from .draw import dimmed, draw_clip  # imports matplotlib

    last = [*kept.values()][-1]  # (t, h, w)
    psm = resize_map(significance(gm, clips), tuple(last.shape))[0]
    draw_clip(out, frames, psm, kept)
    annotated = out.with_suffix(".mp4")
    write_video(annotated, torch.cat([frames, dimmed(frames, last)], dim=-1))
    print(f"picture: {out}\nclip: {annotated}")
