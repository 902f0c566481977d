"""Small proposals, and which positions they choose: a plain transcription of PaPr's map and of its top k."""

from __future__ import annotations

from decimal import Decimal
from itertools import product

import torch.nn.functional as F
from torch import Tensor, nn

from .spec import Spec

TIE = 1e-9  # scores that are as near are one score


class Proposal(nn.Module):
    """A ConvNet: features, and what a kind puts behind them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        three = kind == "clips"
        convolution, norm = (nn.Conv3d, nn.BatchNorm3d) if three else (nn.Conv2d, nn.BatchNorm2d)
        stride = 2 if kind in ("strided", "classifier", "clips") else 1
        self.features = nn.Sequential(
            convolution(3, 6, 3, stride=stride, padding=1),
            norm(6),
            nn.Tanh(),
            convolution(6, 5, 3, padding=1),
            nn.SiLU(),
        )
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        if self.kind == "map":
            return features.mean(dim=1)
        if self.kind == "classifier":
            return self.head(F.adaptive_avg_pool2d(features, 1).flatten(1))
        return features


def squares(features: Tensor) -> Tensor:
    """A map of a user's own: the mean square over the channels."""
    return features.square().mean(dim=1)


def maps_by_hand(spec: Spec, proposal: Proposal, images: Tensor) -> Tensor:
    """The map of images (B, 3, H, W), or of clips (B, 3, T, H, W), before it is resized."""
    frames = images.shape[2] if images.ndim == 5 else 0
    each = frames and proposal.kind != "clips"
    if each:
        images = images.transpose(1, 2).flatten(0, 1)
    if spec.proposal_size:
        rows, columns = images.shape[-2:]
        shorter = min(rows, columns)
        size = (round(rows * spec.proposal_size / shorter), round(columns * spec.proposal_size / shorter))
        images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    features = proposal.features(images)
    maps = squares(features) if spec.saliency == "squares" else features.mean(1)
    return maps.unflatten(0, (-1, frames)) if each else maps


def resized(maps: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Maps on a grid: bicubic, of clips trilinear, with aligned corners."""
    return F.interpolate(maps[:, None], size=grid, mode="bicubic" if len(grid) == 2 else "trilinear", align_corners=True)[:, 0]


def count_by_hand(positions: int, z: float, others: int) -> int:
    """How many positions are kept."""
    return max(1, min(positions, int((positions + others) * Decimal(repr(z)))))


def are_best(scores: Tensor, mask: Tensor, count: int) -> bool:
    """Whether a mask (B, *grid) keeps the best `count` positions of each sample; equal scores count as one."""
    for values, kept in zip(scores.flatten(1), mask.flatten(1), strict=True):
        if int(kept.sum()) != count:
            return False
        rest = values[~kept]
        if rest.numel() and float(rest.max() - values[kept].min()) > TIE * max(1.0, float(values.abs().max())):
            return False
    return True


def cells_of(grid: tuple[int, ...]) -> list[list[int]]:
    """The patches of each cell of 2 x 2, of each frame."""
    frames, rows, columns = grid if len(grid) == 3 else (1, *grid)
    cells: dict[tuple[int, int, int], list[int]] = {}
    for t, r, c in product(range(frames), range(rows), range(columns)):
        cells.setdefault((t, r // 2, c // 2), []).append((t * rows + r) * columns + c)
    return [cells[place] for place in sorted(cells)]


def groups_by_hand(scores: Tensor, z: float, others: int) -> list[list[int]]:
    """What each token of a coarse background stands for, of one map: fine patches first, then cells."""
    cells, values = cells_of(tuple(scores.shape)), scores.flatten().tolist()
    k = count_by_hand(len(values), z, others)
    means = [sum(values[i] for i in cell) / len(cell) for cell in cells]
    best = sorted(range(len(cells)), key=lambda number: -means[number])
    if k < len(cells):
        return [cells[number] for number in sorted(best[:k])]
    fine = [number for number in best if len(cells[number]) == 4][: (k - len(cells)) // 3]
    patches = sorted(i for number in fine for i in cells[number])
    return [[i] for i in patches] + [cells[number] for number in range(len(cells)) if number not in fine]


def halved(images: Tensor, grid: tuple[int, ...], patch: tuple[int, int]) -> Tensor:
    """Images in which each patch holds its whole cell at half size."""
    found = images.clone()
    rows, columns = grid[-2:]
    for r, c in product(range(0, rows, 2), range(0, columns, 2)):
        down, right = min(2, rows - r), min(2, columns - c)
        area = (slice(r * patch[0], (r + down) * patch[0]), slice(c * patch[1], (c + right) * patch[1]))
        pixels = images[..., area[0], area[1]]
        small = F.adaptive_avg_pool2d(pixels.flatten(0, -3), patch)
        found[..., area[0], area[1]] = small.repeat(1, down, right).view(pixels.shape)
    return found
