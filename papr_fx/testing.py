"""For your own test suite: `check` runs every oracle that applies to your model, `assert_golden` compares its graph diff."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .errors import ArgumentError, VerifyError
from .planning.inputs import checked_model, example_images, with_output
from .planning.module import PrunedModule, checked_module, checked_z, set_keep_ratio, shell
from .planning.plan import keep_of
from .proof import coarse, hidden_keys, regions
from .proof.case import Case
from .proof.faults import seen_faults
from .queries import keep_masks
from .review.diff import graph_changes
from .tracing.graphs import cut
from .tracing.numerics import tensors_of
from .transform import transform


class Checked(NamedTuple):
    """What `check` found: it returns only if the model passed.

    Attributes:
        hidden_keys: For tokens, the relative error in float64 against the unpruned model whose attention does not see dropped
            tokens, or where the patches of each coarse cell are equal and it sees one of them; else None.
        masked_branch: For pixels, the same against the dense graph whose pixel operators are multiplied by the mask; else None.
        corrupted: The same with one kept position taken for a dropped one: large, or the oracle would see nothing.
        faults: What the proof said of each fault that was planted, by the fault; empty if none was.
    """

    hidden_keys: float | None
    masked_branch: float | None
    corrupted: float
    faults: Mapping[str, str] = MappingProxyType({})


@torch.no_grad()
def check(
    model: nn.Module,
    proposal: nn.Module | str | None,
    z: float,
    *,
    example_input: Tensor | None = None,
    faults: bool = False,
    **options: Any,
) -> Checked:
    """Runs every oracle that applies on a copy of `model`, in float64 and eval mode, with parameters redrawn at unit scale.

    These are the proof of `transform`, bit-equality at z=1, and a comparison with the unpruned model at the positions that
    the proposal keeps. Tokens: after the last block they must be as if no attention saw the dropped ones. Pixels: the output
    must be as if every pixel operator were multiplied by the mask (and its shortcut, where the background is zero).

    Args:
        model: As for `transform`; not changed.
        proposal: As for `transform`.
        z: Keep ratio in (0, 1).
        example_input: As for `transform`.
        faults: Whether to plant faults in the rewritten graph too, one at a time: tokens of other positions, a forgotten mask,
            and so on. The proof must see each of them. It takes as long as some ten proofs.
        **options: Further options of `transform`.

    Raises:
        PaprError: The model is refused, or an oracle fails, or a fault that changes the output is not seen (`VerifyError`).
    """
    if checked_z(z) == 1:
        raise ArgumentError("check: z must be below 1, where something is pruned; bit-equality at z=1 is checked besides")
    wide = copy.deepcopy(checked_model(model)).cpu().eval().double()
    example = example_images(wide, None if example_input is None else example_input.cpu())
    gm = transform(wide, proposal, z, example_input=example, **options)
    said = seen_faults(with_output(wide, gm.plan.output), gm) if faults else {}
    gm = PrunedModule(shell(gm), gm.plan.reducing(None))  # `transform` has proved merging
    case = Case.of(with_output(wide, gm.plan.output), gm, torch.float64, z=z, batch=3)  # it was traced with two
    kept = [mask.flatten(1).nonzero()[:, 1].view(len(mask), -1) for mask in keep_masks(gm, case.images).values()]  # (B, k)
    chosen = _check_choice(case, gm, kept)
    set_keep_ratio(gm, 1.0)
    whole = case.run(gm, case.images)
    if not all(torch.equal(a, b) for a, b in zip(tensors_of(whole), tensors_of(case.expected), strict=True)):
        raise VerifyError("z=1: the traced model differs from the model")
    found = _compared_coarse(case, *chosen) if case.rewrite.coarse else _compared(case, kept)
    return found._replace(faults=said)


def _check_choice(case: Case, gm: PrunedModule, kept: list[Tensor]) -> list[Tensor]:
    """Raises unless the graph itself keeps these cells (B, k) of each grid, each once. Returns the kept indices."""
    chosen: list[Tensor] = []
    for choice, cells in zip(case.rewrite.choices, kept, strict=True):
        index = case.run(cut(shell(gm), gm.graph, keep_of(gm.graph, choice)), case.images)
        found = choice.rows.cells_of(index).sort(dim=1).values
        fine = found[:, : int((found < choice.rows.cells).sum(1).max())]  # coarse tokens are numbered behind the grid
        if not torch.equal(fine, cells.sort(dim=1).values):
            raise VerifyError("choice: the model does not keep the positions that `keep_masks` returns")
        chosen.append(index)
    return chosen


def _compared_coarse(case: Case, keep: Tensor) -> Checked:
    """Compares kept tokens with the unpruned model on cells of equal tokens, as the proof does, and with one wrong cell."""
    error, allowed = coarse.error(case, keep, keep), coarse.tolerance(case)
    corrupted = coarse.error(case, keep, coarse.with_wrong_cell(keep, case.rewrite.choices[0].rows))
    if not error <= allowed:
        raise VerifyError(f"coarse background: kept tokens are off by {error:.1e} (relative; {allowed:.0e} is allowed)")
    if not corrupted > 1e3 * allowed:
        raise VerifyError(f"coarse background: one wrong cell moves the result by only {corrupted:.1e}, so nothing was checked")
    return Checked(error, None, corrupted)


def _compared(case: Case, kept: list[Tensor]) -> Checked:
    """Compares kept cells with the unpruned model, as the proof does, and with the last of them taken for a dropped one."""
    tokens = case.rewrite.prunes_tokens
    name, oracle = ("hidden keys", hidden_keys.error) if tokens else ("masked branch", regions.error)
    error = oracle(case, kept, kept)
    corrupted = oracle(case, kept, [*kept[:-1], kept[-1][:, :-1]])
    if not error <= case.tolerance:
        raise VerifyError(f"{name}: kept positions are off by {error:.1e} (relative; {case.tolerance:.0e} is allowed)")
    if not corrupted > 1e3 * case.tolerance:
        raise VerifyError(f"{name}: one wrong position moves the result by only {corrupted:.1e}, so nothing was checked")
    return Checked(error, None, corrupted) if tokens else Checked(None, error, corrupted)


def assert_golden(gm: fx.GraphModule, path: str | Path) -> None:
    """Asserts that the graph diff of `gm` is the text in file `path`, which reviewers read when it changes.

    With the environment variable `PAPR_FX_ACCEPT=1` the file is (re)written instead.

    Args:
        gm: A module returned by `transform`.
        path: The golden file.

    Raises:
        AssertionError: The file is missing or differs.
    """
    text = graph_changes(checked_module(gm))
    file = Path(path)
    if os.environ.get("PAPR_FX_ACCEPT") == "1":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return
    accept = "set PAPR_FX_ACCEPT=1 to write it, and review the change"
    if not file.exists():
        raise AssertionError(f"{file} is missing: {accept}")
    if file.read_text() != text:
        raise AssertionError(f"the graph diff is no longer that of {file}: {accept}\n--- now:\n{text}")
