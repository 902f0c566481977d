"""The proof of a rewrite: on the model itself, with parameters that cannot hide a fault.

A rewritten graph in which the kept positions are an input is compared with the model. Parameters are redrawn at unit scale
first: trained or fresh ones may be so small (layer scales of 1e-6, bias tables of zeros) that a wrong rewrite passes.

1. Tracing (`traced`): the dense graph gives the model's output to the bit. The result is in the model's mode.
2. Permutation: given all positions in random order, the rewritten graph gives the model's output.
3. Negative control (`control`): with one position replaced by another, it does not. Else the proof sees nothing.
4. Geometry: changing one patch of the image moves the position that the map scores for it, and no other token.
5. Lengths: with fewer positions, too, the output does not depend on their order.
6. Restoring, if tokens are put back in their places: each place of the grid holds its own token, or the nearest one.
7. Regions, for pixel operators: with fewer positions, the output is that of the dense graph with masked branches.
8. Hidden keys, for tokens: kept tokens are those of the dense graph in which no attention sees the others.
9. Coarse background (`coarse`), if there is one: a coarse token is what equal tokens of its patches would be.
10. Merging (`reduction`), if tokens are merged: the output is that of the dense graph that averages merged tokens.
11. Narrowing, if rows or patches are left out that nobody reads: the output is that of the graph that computes them.
12. Fusing, if attention that is written out becomes one call: the output is that of the graph that writes it out.
13. Training, if the model's code differs in training mode: its graph is that of the model there.
14. Choice: the module itself keeps the positions that its map says, and returns what follows from these.
15. Sizes, if the model takes images of several: all this holds for another size.
16. Reads, for tokens: code behind the last block reads the same tokens of fewer as of all.

Each part is a module with `check(case)`. Its docstring says what fault it finds, why the other parts do not, and an example:
errors there are relative, measured in float64 on the models of `tests/proof`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..planning.module import PrunedModule
from ..tracing.numerics import exact_float32
from . import (
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
from .case import Case, ComparisonError, PrecisionError


class Proof(NamedTuple):
    """Relative errors found: those that had to be small, and the control that had to be large."""

    permutation: float
    order: float
    control: float
    tolerance: float


def prove(model: nn.Module, gm: PrunedModule) -> Proof:
    """Proves that `gm` is `model` on fewer positions; both are left as they are.

    It runs in float32. If a comparison fails there, it runs again in float64, where rounding is far below what a wrong
    position does.

    Args:
        model: The model that was transformed.
        gm: The result.

    Raises:
        VerifyError: A part of the proof fails; the message names the part, the site and the error.
    """
    traced.check_flags(model, gm)
    example = gm.example()
    if example.dtype == torch.float64:
        return _prove(model, gm, torch.float64)
    try:
        return _prove(model, gm, torch.float32)
    except ComparisonError as error:
        if example.device.type == "mps":  # it has no float64
            raise
        try:
            return _prove(model, gm, torch.float64)
        except PrecisionError:
            raise error from None


@torch.no_grad()
def _prove(model: nn.Module, gm: PrunedModule, dtype: torch.dtype) -> Proof:
    case = Case.of(model, gm, dtype)
    with exact_float32():
        traced.check(case)
        noise = permutation.check(case)
        effect = control.check(case)
        geometry.check(case)
        order = lengths.check(case)
        restoring.check(case)
        regions.check(case)
        hidden_keys.check(case)
        coarse.check(case)
        reduction.check(case)
        narrowing.check(case)
        fusing.check(case)
        training.check(case)
        choice.check(case)
        sizes.check(case)
        reads.check(case)
    return Proof(noise, order, effect, case.tolerance)
