"""Pictures of what is kept: photograph, significance map, kept patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor


def draw(path: Path, photograph: Tensor, significance: Tensor, kept: Sequence[Mapping[str, Tensor]]) -> None:
    """Writes a picture with one panel each for the photograph, its map, and every set of kept positions.

    Args:
        path: The PNG file to write.
        photograph: (3, H, W) in [0, 1].
        significance: The map (h, w); shown min-max normalised.
        kept: Rows of panels: masks (rows, columns), True where kept, by title.
    """
    image = photograph.permute(1, 2, 0).clamp(0, 1).cpu()  # (H, W, 3)
    height, width = image.shape[:2]
    across = 2 + max(len(row) for row in kept)
    figure = Figure(figsize=(3 * across, 3.4 * len(kept)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(kept), across, squeeze=False)
    for panel in grid.flat:
        panel.set_axis_off()
    panels = grid[0]
    panels[0].imshow(image.numpy())
    panels[0].set_title("photograph")
    panels[1].imshow(image.numpy())
    panels[1].imshow(
        significance.float().cpu().numpy(), extent=(0, width, height, 0), alpha=0.6, cmap="inferno", interpolation="bicubic"
    )
    panels[1].set_title("significance map")
    for place, masks in enumerate(kept):
        for panel, (title, mask) in zip(grid[place][2:], masks.items(), strict=False):
            shown = F.interpolate(mask.float().cpu()[None, None], size=(height, width), mode="nearest-exact")[0, 0]  # (H, W)
            panel.imshow((image * (0.15 + 0.85 * shown.unsqueeze(-1))).numpy())
            panel.set_title(title)
    figure.savefig(path, dpi=110)
