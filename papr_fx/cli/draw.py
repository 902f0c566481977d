"""Pictures of what is kept: photograph or frames, significance map, kept patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor


def draw(path: Path, photograph: Tensor, significance: Tensor, kept: Sequence[Mapping[str, Tensor]], *, dpi: int = 110) -> None:
    """Writes a picture: one panel for the photograph, one for its map, and one per set of kept positions.

    Args:
        path: The file to write, in the format of its suffix.
        photograph: (3, H, W) in [0, 1].
        significance: The map (h, w), shown min-max normalised.
        kept: One mapping per row of panels, from title to how much is kept of each position (rows, columns), see `dimmed`.
        dpi: Pixels per inch; a panel is three inches wide.
    """
    image = _pixels(photograph)
    height, width = photograph.shape[1:]
    across = 2 + max(len(row) for row in kept)
    figure = Figure(figsize=(3 * across, 3.4 * len(kept)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(kept), across, squeeze=False)
    for panel in grid.flat:
        panel.set_axis_off()
    panels = grid[0]
    panels[0].imshow(image)
    panels[0].set_title("photograph")
    panels[1].imshow(image)
    panels[1].imshow(
        significance.float().cpu().numpy(), extent=(0, width, height, 0), alpha=0.6, cmap="inferno", interpolation="bicubic"
    )
    panels[1].set_title("significance map")
    for place, masks in enumerate(kept):
        for panel, (title, mask) in zip(grid[place][2:], masks.items(), strict=False):
            panel.imshow(_pixels(dimmed(photograph.unsqueeze(0), mask.unsqueeze(0))[0]))
            panel.set_title(title)
    figure.savefig(path, dpi=dpi)


def draw_clip(path: Path, frames: Tensor, psm: Tensor, kept: Mapping[str, Tensor], *, dpi: int = 110) -> None:
    """Writes a picture with one column per time step of the token grid: a frame, its map, the kept tubelets.

    Args:
        path: The file to write, in the format of its suffix.
        frames: (T, 3, H, W) in [0, 1].
        psm: The map on the token grid (t, h, w), shown min-max normalised over the whole clip.
        kept: How much is kept of each tubelet (t, h, w), by title; one row each. See `dimmed`.
        dpi: Pixels per inch; a panel is 1.6 inches wide.
    """
    steps = len(psm)
    first = frames[torch.arange(steps) * len(frames) // steps]  # (t, 3, H, W)
    height, width = frames.shape[-2:]
    figure = Figure(figsize=(1.6 * steps, 1.75 * (2 + len(kept))), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2 + len(kept), steps, squeeze=False)
    low, high = float(psm.min()), float(psm.max())
    for step in range(steps):
        image = _pixels(first[step])
        grid[0][step].imshow(image)
        grid[1][step].imshow(image)
        grid[1][step].imshow(
            psm[step].float().cpu().numpy(), extent=(0, width, height, 0), alpha=0.6, cmap="inferno", vmin=low, vmax=high
        )
        for row, mask in enumerate(kept.values(), start=2):
            grid[row][step].imshow(_pixels(dimmed(first[step : step + 1], mask[step : step + 1])[0]))
    for row, title in enumerate(("frames", "significance map", *kept)):
        grid[row][0].set_ylabel(title.replace(": ", ":\n").replace(", ", ",\n"), fontsize=8)  # longer than a panel is high
        for panel in grid[row]:
            panel.set_xticks([])
            panel.set_yticks([])
    figure.savefig(path, dpi=dpi)


def dimmed(frames: Tensor, level: Tensor) -> Tensor:
    """Shows what is kept of frames (T, 3, H, W) in [0, 1].

    Args:
        frames: The frames.
        level: How much is kept of each position, (t, h, w): all at 1; darkened in between, and at half resolution, as a coarse
            token sees it; black but for a trace at 0.
    """
    size = frames.shape[-2:]
    large = F.interpolate(level.float()[None, None], size=(len(frames), *size), mode="nearest-exact")[0, 0].unsqueeze(1)
    large = large.to(frames.device)
    half = F.interpolate(F.avg_pool2d(frames, 2, ceil_mode=True), size=size, mode="nearest")
    return torch.where((large > 0) & (large < 1), half, frames) * (0.15 + 0.85 * large)


def _pixels(image: Tensor) -> Any:
    return image.permute(1, 2, 0).clamp(0, 1).cpu().numpy()
