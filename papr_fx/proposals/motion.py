"""Motion as the map of a clip: how much each pixel changes from frame to frame. No network runs, so it costs 0 MACs.

The map has the resolution of the clip; the graph averages it over each tubelet (`pool_map`). Under a static camera a tubelet
scores above 0 where something moves in it, or has moved since the frame before it. Multiplied with a proposal's map, what moves
and is significant comes first; where nothing moves, the proposal's map decides.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import wide
from .network import Preparation, SignificanceNet

_FLOOR = 1e-3  # of the largest: what neither of two maps scores keeps the order of the other


class MotionNet(SignificanceNet):
    """Maps clips (B, C, T, H, W) or (B, T, C, H, W) to their motion (B, T, H, W), alone or times a proposal's map."""

    fine = True

    def __init__(self, layout: str, network: SignificanceNet | None) -> None:
        """Takes the axes of clips, BCTHW or BTCHW, and the network whose map is multiplied with motion, if any."""
        if network is None:
            super().__init__(nn.Identity(), nn.Identity(), Preparation(layout))
        else:
            preparation = Preparation(layout, network.per_frame, statistics=network.statistics, doubt=network.doubt)
            super().__init__(network, nn.Identity(), preparation)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        motion = frame_change(images.transpose(1, 2) if self.layout == "BTCHW" else images)
        return _product(motion, self.trunk(images)) if isinstance(self.trunk, SignificanceNet) else motion


def frame_change(clips: Tensor) -> Tensor:
    """How much each pixel of clips (B, C, T, H, W) differs from the frame before: (B, T, H, W), the mean over channels.

    The first frame is compared with the second.
    """
    clips = clips.to(wide(clips))
    change = (clips[:, :, 1:] - clips[:, :, :-1]).abs().mean(1)
    return torch.cat([change[:, :1], change], dim=1)


def _product(motion: Tensor, maps: Tensor) -> Tensor:
    """The product of two maps, each scaled to 0..1 in each clip; `maps` (B, t, h, w) take the size of `motion`."""
    maps = F.interpolate(maps.unsqueeze(1), size=motion.shape[1:], mode="trilinear", align_corners=True).squeeze(1)
    return (_scaled(motion) + _FLOOR) * (_scaled(maps) + _FLOOR)


def _scaled(maps: Tensor) -> Tensor:
    axes = (1, 2, 3)
    low = maps.amin(axes, keepdim=True)
    return (maps - low) / (maps.amax(axes, keepdim=True) - low).clamp(min=torch.finfo(maps.dtype).tiny)
