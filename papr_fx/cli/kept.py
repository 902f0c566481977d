"""What a model keeps of images, as pictures show it: how much of each position, and in words."""

from __future__ import annotations

from torch import Tensor

from ..planning.modes import TokenPlan
from ..planning.module import PrunedModule
from ..queries import Grid, keep_masks, token_map

COARSE = 0.5


def kept_levels(gm: PrunedModule, images: Tensor) -> dict[Grid, Tensor]:
    """How much is kept of each position of each grid, (B, *grid): 1, `COARSE` where a coarse token stands for it, or 0."""
    levels = {grid: mask.float() for grid, mask in keep_masks(gm, images).items()}
    if not is_coarse(gm):
        return levels
    ((grid, fine),) = levels.items()
    return {grid: fine.clamp(min=COARSE * (token_map(gm, images) >= 0).float())}


def is_coarse(gm: PrunedModule) -> bool:
    """Whether patches that are not kept become coarse tokens."""
    mode = gm.plan.mode(gm.training)
    return isinstance(mode, TokenPlan) and mode.coarse


def title(z: float, level: Tensor) -> str:
    """What is kept of one image or clip, its levels on a grid."""
    places = " x ".join(map(str, level.shape))
    coarse = int((level == COARSE).sum())
    return f"z={z:g}: {int((level == 1).sum())} of {places}" + (f", {coarse} coarse" if coarse else "")
