"""The variants of a model that are evaluated: dense, and pruned at several keep ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ArgumentError, first_line
from ..passes.reduction import Reduction
from ..planning.module import sibling
from ..proposals.named import LITE0
from ..proposals.saliency import needs_proposal
from ..review.report import report
from ..tracing.fakes import MODEL_ERRORS
from ..tracing.macs import count_module_macs
from ..transform import transform
from .chance import with_random_map
from .models import proposal_for
from .subject import Subject


@dataclass(frozen=True)
class Variant:
    """One variant of a model.

    Attributes:
        module: The model.
        macs: Multiply-accumulates per image or view, the proposal included.
        z: Keep ratio; 1 for the dense model.
        r: Tokens merged per block: one number, or how they are spread, as `--merge` takes it.
        coarse: Whether patches that are not kept become coarse tokens.
        twin: The same model with a random map, if it is to be compared with that.
    """

    module: nn.Module
    macs: int
    z: float = 1.0
    r: int | str = 0
    coarse: bool = False
    twin: nn.Module | None = None

    @property
    def name(self) -> str:
        """A name that no other variant of the model has."""
        return f"z={self.z:g} r={self.r}" + (" coarse" if self.coarse else "")

    @property
    def twin_name(self) -> str:
        """The name of its twin."""
        return f"{self.name} random"


@dataclass(frozen=True)
class ProposalSpec:
    """Which network proposes, and how it is used.

    Attributes:
        name: Its name, as `proposal_for` takes it.
        pretrained: Whether weights may be loaded from a hub.
        checkpoint: A local file of weights.
        size: `proposal_size` of `transform`.
        shared: Whether it receives the model's normalised images unchanged.
        saliency: `saliency` of `transform`.
    """

    name: str
    pretrained: bool = False
    checkpoint: str = ""
    size: int | tuple[int, ...] | None = None
    shared: bool = False
    saliency: Any = "psm"


def proposal_of(subject: Subject, spec: ProposalSpec) -> tuple[nn.Module | None, dict[str, Any]]:
    """Builds a proposal network, unless the map needs none; returns it with the options of `transform` that go with it.

    Raises:
        ProposalError: No installed library knows it, or its weights cannot be loaded.
        ArgumentError: It takes no checkpoint.
    """
    if not needs_proposal(spec.saliency):
        if spec.checkpoint or spec.shared:
            raise ArgumentError(f"saliency {spec.saliency} uses no proposal: leave out what says how to build and feed one")
        return None, {"proposal_size": spec.size, "saliency": spec.saliency}
    if spec.name == LITE0 and spec.checkpoint:
        raise ArgumentError(f"--proposal-checkpoint: {LITE0} comes with its own weights; name another --proposal")
    proposal, own = proposal_for(subject.statistics, spec.name, pretrained=spec.pretrained, checkpoint=spec.checkpoint)
    stats = "shared" if spec.shared else own
    return proposal, {"proposal_size": spec.size, "input_stats": stats, "saliency": spec.saliency}


def dense(subject: Subject) -> Variant:
    """The model itself.

    Raises:
        ArgumentError: It does not take inputs of that shape.
    """
    try:
        return Variant(subject.model, count_module_macs(subject.model, subject.example))
    except MODEL_ERRORS as error:
        shape = tuple(subject.example.shape)
        raise ArgumentError(f"the model does not take inputs of shape {shape}: {first_line(error)}") from error


def pruned(
    subject: Subject,
    proposal: nn.Module | None,
    ratios: Sequence[float],
    *,
    merge: Reduction | None = None,
    twins: bool = False,
    **options: Any,
) -> list[Variant]:
    """The model pruned at each keep ratio. A model on the meta device has no values, so it is not proved.

    Args:
        subject: The model.
        proposal: A ConvNet; None where the map needs none.
        ratios: Keep ratios in (0, 1].
        merge: Token reduction in the blocks, if any.
        twins: Whether each gets a twin with a random map, where there is a map and it is not random itself.
        **options: Further options of `transform`.

    Raises:
        PaprError: `transform` refuses the model.
    """
    if not ratios:
        return []
    verify = not subject.example.is_meta
    gm = transform(subject.model, proposal, ratios[0], example_input=subject.example, merge=merge, verify=verify, **options)
    words = merge.words if merge else "0"
    r = int(words) if words.isdigit() else words
    found: list[Variant] = []
    for z in ratios:
        module = sibling(gm, z=z)
        twin = with_random_map(gm, z) if twins and z < 1 and options.get("saliency") != "random" else None
        found.append(Variant(module, report(module).total_macs, z, r, options.get("background") == "coarse", twin))
    return found
