"""Part 1, tracing: the dense graph is the model."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import VerifyError
from ..planning.module import PrunedModule
from ..tracing.fakes import flags_of
from ..tracing.numerics import relative_error, structure_of, tensors_of
from .case import Case, PrecisionError


def check(case: Case) -> None:
    """Compares the traced graph with the model, bit by bit, on one image: it was traced with two.

    Fault: tracing froze something into the graph, such as a branch on the batch size. The other parts do not find it: the
    permutation uses the batch size of tracing, and what follows compares graphs that were traced in the same way.
    Example: a toy ViT that doubles its tokens for a batch of one: the graph is off by 0.09.

    Raises:
        VerifyError: They differ, or there is nothing to compare.
    """
    _check_finite(case.expected)
    compare(case.run(case.dense, case.images[:1]), case.expected_first, case.rewrite.name)


def check_flags(model: nn.Module, gm: PrunedModule) -> None:
    """Compares the training flags of the result, of each module, with those of the model. The other parts set their own.

    Raises:
        VerifyError: They differ.
    """
    wanted, found = flags_of(model), flags_of(gm)
    wrong = [name for name, flag in wanted.items() if found.get(name, flag) != flag]
    if wrong:
        raise VerifyError(
            f"tracing: `{wrong[0] or 'the result'}` is in {_mode(found[wrong[0]])} mode, where the model's is in "
            f"{_mode(wanted[wrong[0]])} mode ({len(wrong)} modules): its copy changes flags"
        )


def _mode(training: bool) -> str:
    return "training" if training else "eval"


def compare(actual: object, expected: object, name: str) -> None:
    """Raises `VerifyError` unless two outputs are equal to the bit and of the same classes; `name` is that of the graph."""
    found, wanted = tensors_of(actual), tensors_of(expected)
    if len(found) != len(wanted):
        raise VerifyError(f"tracing: the graph of {name} returns {len(found)} tensors where the model returns {len(wanted)}")
    if structure_of(actual) != structure_of(expected):
        raise VerifyError(
            f"tracing: the graph of {name} returns {structure_of(actual)} where the model returns {structure_of(expected)}"
        )
    if not all(torch.equal(a, e) for a, e in zip(found, wanted, strict=True)):
        raise PrecisionError(
            f"tracing: the graph of {name} differs from the model by {relative_error(actual, expected):.1e} (relative; equal "
            "bits are needed): its forward does something that depends on the batch size or on state"
        )


def _check_finite(output: object) -> None:
    if not tensors_of(output):
        raise VerifyError(f"the model returns no tensors that can be compared, but a {type(output).__name__}")
    if not all(bool(t.isfinite().all()) for t in tensors_of(output)):
        raise VerifyError("the model's output is not finite for parameters at unit scale, so nothing can be compared")
