"""The parts of the proof by name, which of them report a case, and models that several tests get wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import papr_fx
from papr_fx.proof import (
    choice,
    coarse,
    control,
    fusing,
    geometry,
    hidden_keys,
    lengths,
    narrowing,
    permutation,
    reads,
    reduction,
    regions,
    restoring,
    sizes,
    traced,
    training,
)
from papr_fx.proof.case import Case

from ..models import Shape, ToyViT, toy_proposal

PARTS = {
    "tracing": traced,
    "permutation": permutation,
    "negative control": control,
    "geometry": geometry,
    "lengths": lengths,
    "restoring": restoring,
    "regions": regions,
    "hidden keys": hidden_keys,
    "coarse background": coarse,
    "merging": reduction,
    "narrowing": narrowing,
    "fusing": fusing,
    "training": training,
    "choice": choice,
    "sizes": sizes,
    "reads": reads,
}


# The parts that run the module as it is, so that they find nearly everything that others find.
OF_THE_WHOLE = ("choice", "sizes")


def case_of(model: nn.Module, **options) -> Case:
    """A case in float64, in which rounding hides nothing."""
    return Case.of(model.eval(), papr_fx.transform(model, toy_proposal(), 0.5, verify=False, **options), torch.float64)


@torch.no_grad()
def failures(case: Case) -> dict[str, str]:
    """What each part that refuses a case says, by its name. All parts run; a message starts with the part's name."""
    found: dict[str, str] = {}
    for name, part in PARTS.items():
        try:
            part.check(case)
        except papr_fx.VerifyError as error:
            found[name] = str(error)
    assert all(message.startswith(f"{name}: ") for name, message in found.items())
    return found


def found_by_one(case: Case) -> list[str]:
    """The parts that refuse a case, besides those that run the module as it is."""
    return [name for name in failures(case) if name not in OF_THE_WHOLE]


class PicksAToken(ToyViT):
    """Its head reads one token by index."""

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x[:, 3]))


def with_attention(make) -> ToyViT:
    model = ToyViT(Shape()).eval()
    for block in model.blocks:
        block.attn = make()
    return model
