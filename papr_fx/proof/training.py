"""Part 13, training: the graph for training mode is the model in that mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..tracing.numerics import forked_random, relative_error
from . import choice, coarse, geometry, narrowing, reduction, traced
from .case import Case, ComparisonError
from .places import reorder


def check(case: Case) -> None:
    """Repeats tracing, permutation, geometry, coarse tokens, merging and narrowing in training mode, module dropout off.

    Fault: code that runs only in training mode, such as an auxiliary head. The other parts do not find it: they see the
    model in eval mode. If the traced code itself draws random numbers, only the traced graph is compared: a dropout would
    drop other elements of permuted tokens.
    Example: a head that picks a token by its index in training mode: the output is off by 0.37.
    Does nothing where training mode has the same graph, or none.

    Raises:
        VerifyError: They differ.
    """
    trained = case.in_training()
    if trained is None:
        return
    if trained.rewrite.mode.dense is case.rewrite.mode.dense:
        _check_same_trace(case, trained)
        return
    with forked_random(trained.images):
        expected = _seeded(trained, 1, trained.model, trained.images)
        other = _seeded(trained, 0, trained.model, trained.images)
        dense = _seeded(trained, 1, trained.dense, trained.images)
        permuted = _seeded(trained, 1, trained.pruned, trained.images, *trained.indices(trained.orders))
    traced.compare(dense, expected, trained.rewrite.name)
    if relative_error(other, expected) > 0:
        return
    _compare(trained, permuted, reorder(expected, trained.places, trained.orders[0]))
    geometry.check(trained)
    coarse.check(trained)
    reduction.check(trained)
    narrowing.check(trained)
    choice.check(trained)


def _check_same_trace(case: Case, trained: Case) -> None:
    """Where only backgrounds differ: what the traced graph does was checked in eval mode."""
    traced.compare(case.expected, trained.expected, trained.rewrite.name)
    _compare(trained, trained.run_pruned(trained.orders), trained.permuted)
    choice.check(trained)


def _compare(trained: Case, permuted: Any, expected: Any) -> None:
    error = relative_error(permuted, expected)
    if not error <= trained.tolerance:
        raise ComparisonError(
            f"training: in training mode, with all positions kept in random order, the output is off by {error:.1e} "
            f"(relative; {trained.tolerance:.0e} is allowed)"
        )


def _seeded(case: Case, seed: int, module: nn.Module, *inputs: Tensor) -> Any:
    torch.manual_seed(seed)
    return case.run(module, *inputs)
