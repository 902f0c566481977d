"""Part 2, permutation: the order of kept positions does not matter."""

from __future__ import annotations

from .case import Case, ComparisonError


def check(case: Case) -> float:
    """Keeps all positions, in another random order for each image: the output must be the model's.

    Fault: a gather reads the wrong row, or something after it uses a token's index, such as a relative-position bias or a
    head that picks a token. The other parts do not find a gather that mixes up images, as each of them gathers from one
    image only.
    Example: a gather that reads the rows of the next image: the output is off by 0.06.

    Returns:
        The relative error.

    Raises:
        ComparisonError: It is above the tolerance.
    """
    if not case.noise <= case.tolerance:
        raise ComparisonError(
            f"permutation: with all positions kept {case.rewrite.choices[0].where}, in random order, the output is off by "
            f"{case.noise:.1e} (relative; {case.tolerance:.0e} is allowed). Something after it uses the index of a position: "
            "a rotary table, a relative-position bias, a window, a mask, or a head that picks tokens by index"
        )
    return case.noise
