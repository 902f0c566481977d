"""Questions to a rewritten model about images: the saliency map, which positions are kept, where kept tokens belong."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, fx

from .errors import ArgumentError
from .ops import TokenRows, fill_nearest, restore_places
from .passes.kinds import Kind
from .passes.restore_places import FILLS
from .planning.inputs import checked_word
from .planning.modes import Choice
from .planning.module import PrunedModule, checked_module
from .planning.plan import keep_of
from .tracing.graphs import cut
from .tracing.roles import find
from .tracing.sharded import has_parts

Grid = tuple[int, ...]


@torch.no_grad()
def significance(gm: fx.GraphModule, images: Tensor) -> Tensor:
    """The proposal's saliency maps, before they are resized to the token grid (PaPr, Eq. 2).

    Args:
        gm: A module returned by `transform`.
        images: (B, C, H, W), or clips as the model takes them, normalised as it expects.

    Returns:
        (B, h, w), or (B, t, h, w) for clips, float32 or wider.

    Raises:
        ArgumentError: `gm` was not transformed, or `images` has another rank or channel count.
    """
    module = checked_module(gm)
    return module.papr_proposal(_checked_images(module, images))


@torch.no_grad()
def keep_masks(gm: fx.GraphModule, images: Tensor) -> dict[Grid, Tensor]:
    """Which positions are kept, for each grid in use (PaPr, Eq. 3). With a coarse background: which patches stay fine.

    Args:
        gm: A module returned by `transform`.
        images: (B, C, H, W), or clips as the model takes them, normalised as it expects.

    Returns:
        A boolean mask (B, h, w) for each grid (h, w), or (B, t, h, w) for (t, h, w). True where kept; all True at z=1.

    Raises:
        ArgumentError: `gm` was not transformed, or `images` has another rank or channel count, or parameters are in parts.
    """
    module = checked_module(gm)
    masks: dict[Grid, Tensor] = {}
    for rows, keep in _chosen(module, images):
        mask = rows.mask(rows.cells_of(keep))
        masks[rows.grid] = mask if module.plan.z < 1 else torch.ones_like(mask)
    return masks


@torch.no_grad()
def token_map(gm: fx.GraphModule, images: Tensor) -> Tensor:
    """Which token stands for each place of the grid, among the tokens that enter the first block. Ours, beyond the paper.

    With a coarse background one token stands for several places; otherwise for one at most.

    Args:
        gm: A token model returned by `transform`.
        images: (B, C, H, W), or clips as the model takes them, normalised as it expects.

    Returns:
        (B, h, w) int64, or (B, t, h, w) for clips: the place of the token, counted from the first prefix token on, so that it
        is an index into tokens (B, N, C) of `output="features"`; -1 where the place was dropped.

    Raises:
        ArgumentError: `gm` is not a transformed token model, or `images` has another rank or channel count, or parameters are
            in parts.
    """
    module = checked_module(gm)
    if module.plan.kind != "tokens":
        raise ArgumentError("token_map is for token models: pixel operators write back to every position")
    ((rows, keep),) = _chosen(module, images)
    places = rows.places(_kept_cells(module, rows, keep))
    return torch.where(places < 0, places, places + rows.prefix)


def restore_grid(
    gm: fx.GraphModule, tokens: Tensor, images: Tensor, *, fill: float | Tensor | Literal["nearest", "zero"] = 0.0
) -> Tensor:
    """Puts the kept tokens of a headless model back in their places on the grid, for dense heads. Coarse ones fill theirs.

    Args:
        gm: A token model returned by `transform`, for example with `output="features"`.
        tokens: Its output for `images`: (B, prefix + k + suffix, C), or (B, k, C) of patches alone; all tokens at z=1.
        images: The same images (B, C, H, W). The choice is made again, so the precision must be the same too: under autocast
            if the tokens were computed under it.
        fill: What dropped positions hold: a number, a vector (C,) such as a mask token, or as for `transform(restore=...)`
            "nearest", the nearest kept token, or "zero".

    Returns:
        (B, C, h, w) on the model's token grid, or (B, C, t, h, w) for clips.

    Raises:
        ArgumentError: `gm` is not a transformed token model, or `tokens` are not those that it keeps of `images`.
    """
    module = checked_module(gm)
    plan = module.plan
    if plan.kind != "tokens":
        raise ArgumentError("restore_grid is for token models: pixel operators are written back to their grids already")
    if plan.eval.reduces:
        raise ArgumentError(
            "restore_grid: tokens were merged or dropped from block to block, so they have no places of their own"
        )
    ((rows, keep),) = _chosen(module, images)
    cells = _kept_cells(module, rows, keep)
    batch, kept = cells.shape
    found = tuple(tokens.shape) if isinstance(cast(object, tokens), Tensor) else ()
    if len(found) != 3 or found[0] != batch or found[1] not in (kept, rows.others + kept):
        behind = f" + {rows.suffix}" if rows.suffix else ""
        expected = f"(B, {rows.prefix} + {kept}{behind}, C) or (B, {kept}, C)"
        raise ArgumentError(f"tokens must be {expected} for these images, not {found or type(tokens).__name__}")
    first = rows.prefix if found[1] > kept else 0
    patches = tokens[:, first : first + kept]
    if isinstance(fill, str):
        checked_word("fill", fill, FILLS)
        return _filled(rows, patches, cells, zero=fill == "zero")
    if not isinstance(cast(object, fill), int | float | Tensor):
        raise ArgumentError(f"fill must be a number, a vector ({found[2]},) or one of {FILLS}, not {fill!r}")
    filled = torch.as_tensor(fill, dtype=tokens.dtype, device=tokens.device)
    if tuple(filled.shape) not in ((), (found[2],)):
        raise ArgumentError(f"fill must be a number or a vector ({found[2]},), not {tuple(filled.shape)}")
    return rows.restore(patches, cells, filled)


def _filled(rows: TokenRows, patches: Tensor, cells: Tensor, *, zero: bool) -> Tensor:
    """Patches (B, k, C) at their cells (B, k), (B, C, *grid), with dropped places filled as in a rewritten graph."""
    places = rows.places(cells).flatten(1)
    index = places if zero else fill_nearest(places, rows.grid)
    return restore_places(patches, index, 1, zero=zero).transpose(1, 2).unflatten(2, rows.grid)


def _kept_cells(module: PrunedModule, rows: TokenRows, keep: Tensor) -> Tensor:
    """The cells of kept indices, (B, k): all at z=1, where the choice is that of another keep ratio."""
    if module.plan.z == 1:
        return torch.arange(rows.cells, device=keep.device).expand(len(keep), -1)
    return rows.cells_of(keep)


class _Chosen(NamedTuple):
    """A choice on given images: the rows on their grid, and the kept indices (B, prefix + k + suffix)."""

    rows: TokenRows
    keep: Tensor


@torch.no_grad()
def _chosen(module: PrunedModule, images: Tensor) -> list[_Chosen]:
    """The choices that the graph makes; at z=1, where it makes none, those of z=0.5."""
    if has_parts(module):
        raise ArgumentError("sought whole parameters, found parts of them (fully_shard): call gm.unshard() first")
    plan = module.plan if module.plan.z < 1 else module.plan.at(0.5)
    graph = plan.rewrite(module.training)
    choices: tuple[Choice, ...] = plan.choices(module.training)
    wanted = [node for choice in choices for node in (find(graph, Kind.PSM, choice.number), keep_of(graph, choice))]
    values = cut(module, graph, *wanted)(_checked_images(module, images))
    pairs = zip(choices, values[::2], values[1::2], strict=True)
    return [_Chosen(replace(choice.rows, grid=tuple(psm.shape[1:])), keep) for choice, psm, keep in pairs]


def _checked_images(gm: PrunedModule, images: object) -> Tensor:
    shape, layout = gm.plan.example.shape, gm.plan.target.layout
    axis = layout.index("C")
    free = isinstance(images, Tensor) and gm.plan.target.dynamic and images.ndim == len(layout)
    free = free and cast(Tensor, images).shape[axis] == shape[axis]
    if not isinstance(images, Tensor) or not (free or images.shape[1:] == shape[1:]):
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        axes = ", ".join(layout.replace("C", str(shape[axis])))
        raise ArgumentError(f"images must be a tensor ({axes}) such as (1, {', '.join(map(str, shape[1:]))}), not {found}")
    signature = gm.plan.signature
    signature.check_size(images)
    return signature.converted(images, gm.get_parameter(signature.cast).dtype) if signature.cast else images
