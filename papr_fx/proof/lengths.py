"""Part 5, lengths: with fewer positions, too, their order does not matter."""

from __future__ import annotations

import torch

from ..tracing.numerics import relative_error
from .case import Case, ComparisonError
from .places import reorder


def check(case: Case) -> float:
    """Keeps two thirds of the positions, in two orders: the outputs must be equal.

    Fault: code that is right with all positions and not with fewer, such as a head that numbers the tokens by their count.
    The other parts do not find it: the permutation keeps all positions, and hidden keys end with the last block.
    Example: a head that weights tokens by their index if there are fewer than 17: the outputs differ by 0.03,
    those of the permutation by 4e-16.

    Returns:
        The relative error.

    Raises:
        ComparisonError: It is more than one wrong position causes.
    """
    flipped = case.run_pruned([cells.flip(1) for cells in case.kept])
    backwards = torch.arange(case.kept[0].shape[1], device=case.images.device).flip(0).unsqueeze(0)
    error = relative_error(flipped, reorder(case.kept_output, case.places, backwards))
    if not error <= case.allowed:
        raise ComparisonError(
            f"lengths: with fewer positions {case.rewrite.choices[0].where}, the output depends on their order ({error:.1e}, "
            f"{case.allowed:.0e} is allowed): positions seem to be recomputed from the token count"
        )
    return error
