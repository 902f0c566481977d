"""What an evaluation counts, and how far it has come; counts of several processes or runs add up."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from ..proposals.network import SignificanceNet


@dataclass
class Counts:
    """What was counted for one variant of a model.

    Attributes:
        labelled: Samples that have a class.
        top1: Labelled samples whose class ranks first.
        top5: Labelled samples whose class is among the first five.
        agree: Samples on which the variant's first class is the dense model's.
        real: Samples whose first class is among ImageNet's reassessed labels.
        real_total: Samples that have such labels.
        seconds: Time that the variant took, without reading data.
        wins: Labelled samples that are right here, and wrong with a random map.
        losses: Labelled samples that are wrong here, and right with a random map.
        wins_agree: Samples that agree with the dense model here, and do not with a random map.
        losses_agree: Samples that do not agree with it here, and do with a random map.
    """

    labelled: int = 0
    top1: int = 0
    top5: int = 0
    agree: int = 0
    real: int = 0
    real_total: int = 0
    seconds: float = 0.0
    wins: int = 0
    losses: int = 0
    wins_agree: int = 0
    losses_agree: int = 0

    def compare(self, found: Tensor, twin: Tensor, labels: Tensor, dense: Tensor) -> None:
        """Adds wins and losses of a batch.

        Args:
            found: The class that this variant ranks first of each sample, (B,).
            twin: The same of its twin with a random map.
            labels: The classes; negative where a sample has none, and then it counts for agreement only.
            dense: What the dense model ranks first.
        """
        right, other = found == labels, twin == labels
        self.wins += int((right & ~other).sum())
        self.losses += int((other & ~right).sum())
        agrees, other = found == dense, twin == dense
        self.wins_agree += int((agrees & ~other).sum())
        self.losses_agree += int((other & ~agrees).sum())

    def add(self, other: Counts) -> None:
        """Adds the counts of another run."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Progress:
    """How far an evaluation has come.

    Attributes:
        done: Samples taken so far, from the start of the data.
        total: Those of them that could be read.
        counts: The counts of each variant, by name.
        failed: Index and reason of each sample that could not be read.
    """

    done: int = 0
    total: int = 0
    counts: dict[str, Counts] = field(default_factory=dict[str, Counts])
    failed: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])

    def add(self, other: Progress) -> None:
        """Adds what another process counted of the same chunk; `done` stays."""
        self.total += other.total
        for name, counts in other.counts.items():
            self.counts.setdefault(name, Counts()).add(counts)
        self.failed = sorted({*self.failed, *other.failed})


def count_parameters(module: nn.Module) -> int:
    """Parameters of a model, with those of the proposal, which are buffers there."""
    proposals = (part.weights for part in module.modules() if isinstance(part, SignificanceNet))
    return sum(parameter.numel() for parameter in module.parameters()) + sum(proposals)
