"""Maps to compare under a trained ViT, and photographs whose subject is off the centre."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papr_fx.proposals.named import lite0

PATCH = 14  # of the ViT
SHIFT = 64  # pixels


def centre(features: Tensor) -> Tensor:
    """A map (B, h, w) that is highest in the centre, for features (B, K, h, w)."""
    rows, columns = (torch.linspace(-1, 1, size, device=features.device) for size in features.shape[-2:])
    return -(rows.square().unsqueeze(1) + columns.square()).expand(features.shape[0], -1, -1)


class Detail(nn.Module):
    """A map (B, h, w) of images (B, 3, H, W) that takes no network: the standard deviation of the pixels of each patch."""

    def forward(self, images: Tensor) -> Tensor:
        mean, square = F.avg_pool2d(images, PATCH), F.avg_pool2d(images.square(), PATCH)
        return (square - mean.square()).clamp(min=0).mean(1).sqrt()


class PsmAndDetail(nn.Module):
    """The sum of Lite0's PSM and of the detail, both with zero mean and unit deviation over an image."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.detail = lite0(), Detail()

    def forward(self, images: Tensor) -> Tensor:
        detail = self.detail(images).unsqueeze(1)
        psm = cast(Tensor, cast(Any, self.network).extract_features(images)).mean(1, keepdim=True)
        psm = F.interpolate(psm, size=detail.shape[-2:], mode="bicubic", align_corners=False)
        return (_standardised(psm) + _standardised(detail)).squeeze(1)


def _standardised(maps: Tensor) -> Tensor:
    mean, deviation = maps.mean((-2, -1), keepdim=True), maps.std((-2, -1), keepdim=True)
    return (maps - mean) / deviation.clamp(min=1e-6)


def off_centre(images: Tensor) -> Tensor:
    """Images (n, 3, H, W), each moved by 64 pixels towards a corner, which takes turns. What is missing is mirrored."""
    padded = F.pad(images, (SHIFT,) * 4, mode="reflect")
    rows, columns = images.shape[-2:]
    moved = [image[:, 2 * SHIFT * (i // 2 % 2) :, 2 * SHIFT * (i % 2) :][:, :rows, :columns] for i, image in enumerate(padded)]
    return torch.stack(moved)
