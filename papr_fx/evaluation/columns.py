"""What a survey says of each structure besides its proof: whether rows are narrowed, and whether it runs in bfloat16.

This takes minutes where a survey takes hours: one architecture of each structure, with two blocks where their number can be
chosen, without a proof, which holds in any dtype.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from ..errors import PaprError
from ..planning.modes import TokenPlan
from ..planning.module import PrunedModule
from ..tracing.fakes import MODEL_ERRORS
from ..tracing.numerics import relative_error, tensors_of
from ..transform import transform
from .survey import Row, one_thread
from .zoo import Architecture

# Relative errors of bfloat16 with random weights are below: it has 8 bits.
_ALLOWED = 0.1
_BLOCKS = 2


def with_columns(
    rows: Sequence[Row],
    z: float = 0.5,
    *,
    workers: int = 1,
    patterns: Sequence[str] = ("*",),
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """The same rows with `narrowed` and `bfloat16`, tried on the architectures that were proved, known of those that are alike.

    What is there already stays.

    Args:
        rows: From `survey`, or read back from its page.
        z: Keep ratio.
        workers: Processes, of one thread each.
        patterns: Which to try, by names or families.
        progress: Called with a line for every structure.
    """
    missing = [row for row in rows if row.proof.startswith("proved") and not row.bfloat16]
    chosen = [row for row in missing if any(_matches(row, pattern) for pattern in patterns)]
    found: dict[tuple[str, str], Row] = {}
    with multiprocessing.get_context("spawn").Pool(workers, one_thread, maxtasksperchild=50) as pool:
        for row in pool.imap_unordered(partial(tried, z=z), chosen):
            found[row.architecture.library, row.architecture.name] = row
            progress(f"{row.architecture.name}: narrowed {row.narrowed or '-'}, bfloat16 {row.bfloat16}")
        pool.close()
        pool.join()
    return [_as_found(row, found) for row in rows]


def _as_found(row: Row, found: dict[tuple[str, str], Row]) -> Row:
    other = found.get((row.architecture.library, row.proof.removeprefix("as ") if row.mode else ""))
    own = found.get((row.architecture.library, row.architecture.name), other)
    return replace(row, narrowed=own.narrowed, bfloat16=own.bfloat16) if own else row


def _matches(row: Row, pattern: str) -> bool:
    return fnmatch(row.architecture.name, pattern) or fnmatch(row.architecture.family, pattern)


def tried(row: Row, z: float) -> Row:
    """A proved row with `narrowed` and `bfloat16`."""
    try:
        gm = pruned(row, z, torch.bfloat16)
    except PaprError as error:
        return replace(row, bfloat16=f"no: {' '.join(str(error).splitlines())}")
    return replace(row, narrowed=narrowed(gm), bfloat16=in_bfloat16(gm))


def pruned(row: Row, z: float, dtype: torch.dtype, *, narrow: bool = True) -> PrunedModule:
    """An architecture with random weights in a dtype, transformed as its row says, not proved."""
    torch.manual_seed(0)
    model = _small(row.architecture).to(dtype)
    images = row.architecture.images(model)
    mode, output = cast(Any, row.mode), cast(Any, row.output)
    proposal = nn.Conv2d(3, 1, 16, 16)  # any map will do
    return transform(
        model,
        proposal,
        z,
        example_input=images,
        mode=mode,
        output=output,
        saliency=_by_place,
        input_stats="shared",
        narrow=narrow,
        verify=False,
    )


def narrowed(gm: PrunedModule) -> str:
    """Whether rows are left out, "yes" or "no"; nothing where positions are no tokens."""
    mode = gm.plan.eval
    return ("yes" if mode.narrowing.sites else "no") if isinstance(mode, TokenPlan) else ""


@torch.no_grad()
def in_bfloat16(gm: PrunedModule) -> str:
    """Runs a module that was transformed in bfloat16, and converts it: "yes" if both give about the same, or why not.

    Where they do not, "yes" if the dense model is about as far off: with random weights some models round that much.
    """
    try:
        error = _rounding(gm)
        if error >= _ALLOWED:
            gm.bfloat16().retarget(1.0)
            error = 0.0 if error <= 2 * _rounding(gm) else error
    except MODEL_ERRORS as error:
        return f"no: {type(error).__name__}: {error}".splitlines()[0]
    return "yes" if error < _ALLOWED else f"off by {error:.0e}"


def _rounding(gm: PrunedModule) -> float:
    """How far a module in bfloat16 is off from itself in float32, which it is afterwards."""
    images = random_images(gm)
    half, whole = tensors_of(gm(images)), tensors_of(gm.float()(images.float()))
    return relative_error([tensor.float() for tensor in half], [tensor.float() for tensor in whole])


def random_images(gm: fx.GraphModule) -> Tensor:
    """One random image or clip as the module takes it."""
    example = cast(PrunedModule, gm).example()
    return torch.randn(example.shape, generator=torch.Generator().manual_seed(0)).to(example.dtype)


def _by_place(features: Tensor) -> Tensor:
    """A map that is the same in every dtype, so that the same positions are kept."""
    rows, columns = features.shape[-2:]
    place = torch.arange(rows * columns, device=features.device, dtype=torch.float32).view(rows, columns)
    return place.expand(features.shape[0], rows, columns)


def _small(architecture: Architecture) -> nn.Module:
    """The architecture with a few blocks, if their number can be chosen; otherwise as it is."""
    if architecture.library != "torchvision":
        try:
            model = replace(architecture, depth=_BLOCKS).create()
            with torch.no_grad():
                model.eval()(architecture.images(model))
        except MODEL_ERRORS:  # its builder takes no depth, or counts on more
            pass
        else:
            return model
    return architecture.create()
