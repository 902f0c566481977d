"""Part 3, negative control: the proof can see a wrong position."""

from __future__ import annotations

import torch

from .case import Case, ComparisonError


def check(case: Case) -> float:
    """Replaces one kept position of each grid by another: the output must move, far more than by rounding.

    Fault: the output does not depend on single positions, so a comparison with it proves nothing. The other parts do not
    find it: they ask for small errors, and there all errors are small.
    Example: a toy ViT whose head multiplies its tokens by zero: one wrong token moves the output by 5e-17.

    Returns:
        How far the output moves, relative, for the position that matters least.

    Raises:
        ComparisonError: It moves by too little; `additions` are those of the grid's pixel operators.
    """
    # One of a stage's thousands of positions moves the output less than one token does: there, rounding is the floor.
    floor = case.tolerance / 10 if case.rewrite.prunes_tokens else 40 * torch.finfo(case.images.dtype).eps
    for choice, effect in zip(case.rewrite.choices, case.effects, strict=True):
        if effect is not None and not effect > max(floor, 10 * case.noise):
            raise ComparisonError(
                f"negative control: with one position replaced {choice.where}, the output moves by only {effect:.1e}, where "
                f"the error is {case.noise:.1e}, so the proof would not see a fault. Pass verify=False if the model is right "
                "to ignore single positions",
                case.rewrite.additions_on(choice.rows.grid),
            )
    return case.least_effect
