"""Finds out at which end of a token stream its other tokens stand: in front of the patches or behind them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, fx
from torch.func import functional_call

from ..errors import NoSiteError, TraceError, first_line
from ..ops import TokenRows
from ..tracing.fakes import MODEL_ERRORS
from ..tracing.numerics import forked_random


def tokens_behind(part: fx.GraphModule, images: Tensor, rows: TokenRows) -> int:
    """How many tokens stand behind the patches of a stream.

    A patch token follows from the image, and a class token does not. So the image is filled with NaN: the rows of the stream
    that are not NaN are the other tokens.

    Args:
        part: The graph as far as the stream, over a scratch copy of the model's modules.
        images: Images of the traced shape.
        rows: What the stream's rows stand for, with all other tokens in front.

    Raises:
        NoSiteError: Other tokens stand between the patches.
        TraceError: The graph does not run.
    """
    if not rows.prefix:
        return 0
    moved = _follow_image(part, images)
    if int(moved.sum()) != rows.cells:  # another token is computed from the image too, which `proof/geometry` refuses
        return 0
    first = int(moved.int().argmax())
    if not bool(moved[first : first + rows.cells].all()):
        stream = part.graph.output_node().all_input_nodes[0].name
        runs = " + ".join(str(len(run)) for run in "".join("x" if row else " " for row in moved.tolist()).split())
        raise NoSiteError(
            f"other tokens stand between the patches of `{stream}`: sought {rows.cells} patches in one run, found {runs}. Put "
            "the other tokens in front of the patches or behind them"
        )
    return len(moved) - first - rows.cells


@torch.no_grad()
def _follow_image(part: fx.GraphModule, images: Tensor) -> Tensor:
    """Which rows of the stream change with the image, (N,). Parameters on the meta device are taken to be ones."""
    own = [*part.named_parameters(remove_duplicate=False), *part.named_buffers(remove_duplicate=False)]
    on_meta = {name: t for name, t in own if t.is_meta}
    values = {name: torch.full(t.shape, t.is_floating_point(), device="cpu", dtype=t.dtype) for name, t in on_meta.items()}
    plain = torch.zeros((1, *images.shape[1:]), dtype=images.dtype, device="cpu" if images.is_meta else images.device)
    if images.is_floating_point():
        changed = torch.full_like(plain, torch.nan)
    else:
        changed = torch.arange(plain.numel(), device=plain.device).remainder(251).to(plain.dtype).view_as(plain)
    try:
        with forked_random(plain):
            before, after = (cast(Tensor, functional_call(part, values, (image,))) for image in (plain, changed))
    except torch.OutOfMemoryError:  # says nothing about the model
        raise
    except MODEL_ERRORS as error:
        raise TraceError(
            f"the graph as far as the tokens does not run on one image {tuple(plain.shape)}: {first_line(error)}"
        ) from error
    return (before != after).any(-1)[0]  # NaN differs from every number
