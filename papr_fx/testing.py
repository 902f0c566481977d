"""For your own test suite: every oracle that applies to your model (`check`), its graph diff under review (`assert_golden`)."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from .errors import ArgumentError, VerifyError
from .passes import prune_tokens
from .passes.prune_pixels import mask_branches
from .planning.inputs import checked_model, example_images, with_output
from .planning.module import PrunedModule, checked_module, checked_z, keep_masks, set_keep_ratio, shell
from .planning.plan import Pixels, Tokens
from .proof.hidden_keys import HiddenKeys
from .review.diff import graph_changes
from .tracing.graphs import cut
from .tracing.numerics import redraw, relative_error, tensors_of
from .transform import transform

_TOLERANCE = 1e-9


class Checked(NamedTuple):
    """What `check` found: it returns only if the model passed.

    Attributes:
        hidden_keys: For tokens, the relative error against the unpruned model with dropped tokens hidden from every attention,
            in float64; else None.
        masked_branch: For pixels, the same against the dense graph whose pixel operators are multiplied by the mask; else None.
        corrupted: The same with one kept position taken for a dropped one: large, or the oracle would see nothing.
    """

    hidden_keys: float | None
    masked_branch: float | None
    corrupted: float


@torch.no_grad()
def check(
    model: nn.Module, proposal: nn.Module | str, z: float, *, example_input: Tensor | None = None, **options: Any
) -> Checked:
    """Runs every oracle that applies on a copy of `model`, in float64 and eval mode, with parameters redrawn at unit scale.

    The proof of `transform`; bit-equality at z=1; and one that compares kept positions with the unpruned model. Tokens: those
    behind the last block must be as if the dropped tokens were hidden from every attention. Pixels: the output must be as if
    every pixel operator were multiplied by the mask (and its shortcut, where the background is zero).

    Args:
        model: As for `transform`; not changed.
        proposal: As for `transform`.
        z: Keep ratio in (0, 1).
        example_input: As for `transform`.
        **options: Further options of `transform`.

    Raises:
        PaprError: The model is refused, or an oracle fails (`VerifyError`).
    """
    if checked_z(z) == 1:
        raise ArgumentError("check: z must be below 1, where something is pruned; bit-equality at z=1 is checked besides")
    random = torch.Generator().manual_seed(0)
    wide = copy.deepcopy(checked_model(model)).cpu().eval().double()
    wide.load_state_dict(redraw(wide, random, torch.float64), strict=False)
    example = example_images(wide, None if example_input is None else example_input.cpu())
    gm = transform(wide, proposal, z, example_input=example, **options)
    gm = PrunedModule(shell(gm), gm.plan.pruning)  # merging was proved on its own
    images = torch.randn((3, *example.shape[1:]), generator=random, dtype=torch.float64)
    set_keep_ratio(gm, 1.0)
    whole = with_output(wide, gm.plan.output)(images)
    if not all(torch.equal(a, b) for a, b in zip(tensors_of(gm(images)), tensors_of(whole), strict=True)):
        raise VerifyError("z=1: the traced model differs from the model")
    set_keep_ratio(gm, z)
    operator = gm.plan.operator
    name = "hidden keys" if isinstance(operator, Tokens) else "masked branch"
    error, corrupted = _hidden_keys(gm, images) if isinstance(operator, Tokens) else _masked_branch(gm, operator, images)
    if not error <= _TOLERANCE:
        raise VerifyError(f"{name}: kept positions are off by {error:.1e} (relative; {_TOLERANCE:.0e} is allowed)")
    if not corrupted > 1e3 * _TOLERANCE:
        raise VerifyError(f"{name}: one wrong position moves the result by {corrupted:.1e} only, so nothing was checked")
    return Checked(error, None, corrupted) if isinstance(operator, Tokens) else Checked(None, error, corrupted)


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


def _hidden_keys(gm: PrunedModule, images: Tensor) -> tuple[float, float]:
    nodes = {node.name: node for node in gm.graph.nodes}
    keep_node, tokens = nodes["papr_keep"], nodes["papr_tokens"]
    prefix = cast(int, keep_node.args[2])
    (mask,) = keep_masks(gm, images).values()
    kept_patches = mask.flatten(1)  # (B, n)
    hidden = torch.cat([torch.zeros(len(images), prefix, dtype=torch.bool), ~kept_patches], dim=1)
    order = cast(Tensor, cut(gm, gm.graph, keep_node)(images)).unsqueeze(-1)  # (B, K, 1)
    graph = gm.plan.dense_graph(False)
    stream = next(node for node in graph.nodes if node.name == tokens.all_input_nodes[0].name)
    end = prune_tokens.last_tokens(graph, stream, cast(Tokens, gm.plan.operator).blocks)
    pruned = cast(Tensor, cut(gm, gm.graph, nodes[end.name])(images))
    unpruned = cut(gm, graph, end)

    def error(hide: Tensor) -> float:
        with HiddenKeys(hide) as mode:
            dense = cast(Tensor, unpruned(images))
        if not mode.seen:
            raise VerifyError("hidden keys: no attention over all tokens was seen, so this oracle says nothing about the model")
        return relative_error(pruned, dense.gather(1, order.expand(-1, -1, dense.shape[-1])))

    corrupt = hidden.clone()
    corrupt[torch.arange(len(images)), order[:, -1, 0]] = True  # a kept token, hidden from the others
    return error(hidden), error(corrupt)


def _masked_branch(gm: PrunedModule, operator: Pixels, images: Tensor) -> tuple[float, float]:
    graph = mask_branches(gm.plan.dense_graph(False), operator.sites[False], operator.background)
    masked = fx.GraphModule(gm, graph)
    masks = [mask.flatten(1).to(images.dtype) for mask in keep_masks(gm, images).values()]  # (B, n) each
    pruned = gm(images)
    error = relative_error(pruned, masked(images, *masks))
    kept = masks[-1][0].nonzero()[0]
    masks[-1][0, kept] = 0
    return error, relative_error(pruned, masked(images, *masks))
