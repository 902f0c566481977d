"""Does the map help? A pruned model beside its twin, whose map is random, on the same images.

Both see every image, so the answers are compared image by image (McNemar's test). Of n images, the map wins those that are
right with it and wrong with the random one, and loses those of which the opposite holds. The difference of the accuracies is
(wins - losses) / n, and its standard error sqrt(wins + losses + 1) / n: if the map does nothing, each of these images is a toss
of a coin. The 1 keeps a few images, on all of which both are right or wrong, from counting as certainty.

- "better": the difference is more than two standard errors.
- "no better": it is not, and two standard errors above it are less than 5 points.
- "too few": neither; the map may be 5 points better, or do nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..planning.module import PrunedModule, shell
from ..proposals.chance import ChanceNet
from .counts import Progress

Verdict = Literal["better", "no better", "too few"]

_POINTS = 5.0  # a difference that the images should be able to show


@dataclass(frozen=True)
class Versus:
    """A map against a random one on the same images.

    Attributes:
        images: How many images, or videos.
        wins: Those that are right with the map only.
        losses: Those that are right with the random map only.
        remedy: What could help if the map is no better.
    """

    images: float
    wins: float
    losses: float
    remedy: str = "another proposal, or a map of your own"

    @property
    def difference(self) -> float:
        """How far the map is above the random one, in points of a hundred."""
        return 100 * (self.wins - self.losses) / self.images

    @property
    def error(self) -> float:
        """The standard error of the difference, in points."""
        return 100 * (self.wins + self.losses + 1) ** 0.5 / self.images

    @property
    def verdict(self) -> Verdict:
        """Whether the map is better than chance."""
        if self.difference > 2 * self.error:
            return "better"
        return "no better" if self.difference + 2 * self.error < _POINTS else "too few"

    def said(self, kind: str = "images") -> str:
        """The verdict as a sentence for the reader of the results; `kind` is what the samples are called."""
        if self.verdict == "better":
            return f"on these {kind} the map is better than chance"
        if self.verdict == "no better":
            return f"on these {kind} the map is no better than chance: use {self.remedy}"
        return f"too few {kind} to tell whether the map is better than chance"

    def __str__(self) -> str:
        """Its figures, in points."""
        return f"{self.difference:+.1f} +- {self.error:.1f}"


def with_random_map(gm: PrunedModule, z: float) -> PrunedModule:
    """The twin of a transformed model: over the same tensors, at keep ratio z, with a random map for each image."""
    layout, shape = gm.plan.target.layout, gm.plan.example.shape
    finest = max(choice.rows.grid for choice in gm.plan.choices(gm.training))
    extent = [size for size, letter in zip(shape, layout, strict=True) if letter in "THW"]
    cell = tuple(max(1, size // count) for size, count in zip(extent, finest, strict=True))
    root = shell(gm)
    root.papr_proposal = network = ChanceNet(layout, cell)
    return PrunedModule(root, gm.plan.at(z).seeing(network))


def remedy(gm: PrunedModule) -> str:
    """What could help a transformed model whose map is no better than a random one."""
    others = Versus.remedy
    coarse = gm.plan.kind != "tokens" or any(choice.coarse for choice in gm.plan.choices(gm.training))
    return others if coarse else f'background="coarse", {others}'


def compared(progress: Progress, name: str, gm: PrunedModule) -> Versus:
    """What an evaluation counted of a variant and its twin: right answers; without classes, agreement with the dense model."""
    counts = progress.counts[name]
    if counts.labelled:
        return Versus(counts.labelled, counts.wins, counts.losses, remedy(gm))
    return Versus(progress.total, counts.wins_agree, counts.losses_agree, remedy(gm))
