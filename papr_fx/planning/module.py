"""What `transform` returns: a GraphModule that can be re-targeted, and the questions that can be asked of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from dataclasses import replace
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from ..errors import ArgumentError
from ..proposals.network import SignificanceNet
from ..tracing.fakes import scratch_copy
from ..tracing.graphs import cut, propagate, remove_dead_code
from .plan import Choice, Pixels, Plan

Grid = tuple[int, ...]


class PrunedModule(fx.GraphModule):
    """A rewritten model: its own modules and tensors, the proposal under `papr_proposal`, and the `plan` it follows.

    Tensors are shared with the model it came from, module objects are not: `train()` and `eval()` here change nothing
    there, while an optimiser step or `.to()` acts on both.
    """

    plan: Plan
    papr_proposal: SignificanceNet

    def __init__(self, root: nn.Module, plan: Plan) -> None:
        """Builds the graph that `plan` describes over the modules of `root`, which holds `papr_proposal`."""
        super().__init__(root, plan.rewrite(root.training), plan.name)
        self._modules = dict(root._modules)  # whole, where GraphModule copies only what its graph calls
        self._parameters.update(root._parameters)
        self._buffers.update(root._buffers)
        constants = set(self._buffers) - set(root._buffers)  # plain tensors of the model, no part of its state
        self._non_persistent_buffers_set = set(root._non_persistent_buffers_set) | constants
        self._finish(plan)

    def example(self) -> Tensor:
        """Uninitialised images of the traced shape, in the model's dtype and on its device."""
        return _images_like(self, self.plan.shape)

    def retarget(self, z: float) -> None:
        """Rewrites the graph for keep ratio `z`, in place."""
        self._follow(replace(self.plan, z=z), self.training)

    def leave_alone(self, merges: Collection[str], reason: str) -> bool:
        """Makes the pixel operators that feed `merges` dense again; False, and nothing done, if no other would be left."""
        operator = self.plan.operator
        if not isinstance(operator, Pixels) or not operator.without(merges, reason).sites[self.training]:
            return False
        self._follow(replace(self.plan, operator=operator.without(merges, reason)), self.training)
        return True

    def train(self, mode: bool = True) -> PrunedModule:
        """Sets training mode, with the graph that was traced for it. The proposal stays in eval mode."""
        if mode != self.training and not self.plan.one_graph:
            self._follow(self.plan, mode)
        return cast(PrunedModule, super().train(mode))

    def _follow(self, plan: Plan, training: bool) -> None:
        self.graph = plan.rewrite(training)
        self._finish(plan)

    def _finish(self, plan: Plan) -> None:
        self.plan = plan
        remove_dead_code(self.graph)  # dense values in whose place kept ones stand
        self.recompile()
        propagate(self.for_shapes(), self.graph, self.example())

    def for_shapes(self) -> nn.Module:
        """A copy of the modules to run on fake tensors."""
        root = scratch_copy(shell(self))
        if self.example().is_meta:  # the proposal keeps its weights; for shapes alone it follows the model
            root.papr_proposal = copy.deepcopy(self.papr_proposal).to("meta")
        return root

    def __deepcopy__(self, memo: dict[int, Any]) -> PrunedModule:
        copied = PrunedModule(copy.deepcopy(shell(self), memo), self.plan)
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return PrunedModule, (shell(self), self.plan)


def shell(gm: PrunedModule) -> nn.Module:
    """A plain module with the children and tensors of `gm`, from which another one can be built."""
    root = nn.Module()
    root.training = gm.training
    root._modules.update(gm._modules)
    root._parameters.update(gm._parameters)
    root._buffers.update(gm._buffers)
    root._non_persistent_buffers_set = set(gm._non_persistent_buffers_set)
    return root


def _images_like(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    tensors = (t for t in [*module.parameters(), *module.buffers()] if t.is_floating_point())
    tensor = next(tensors, torch.empty(0))
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)


def checked_z(z: object) -> float:
    """Returns keep ratio `z` as a float, or raises `ArgumentError` unless it is a real number in (0, 1]."""
    if isinstance(z, bool) or not isinstance(z, Real):
        raise ArgumentError(f"z (the share of tokens kept) must be a number in (0, 1], not {z!r} ({type(z).__name__})")
    ratio = float(z)
    if not math.isfinite(ratio) or not 0 < ratio <= 1:
        raise ArgumentError(f"z (the share of tokens kept) must lie in (0, 1], not {z!r}; z=0.5 keeps half of the tokens")
    return ratio


def checked_module(gm: object) -> PrunedModule:
    """Returns `gm`, or raises `ArgumentError` if it is no transformed module."""
    if isinstance(gm, PrunedModule):
        return gm
    hint = "; pass the module that was given to torch.compile" if hasattr(gm, "_orig_mod") else ""
    raise ArgumentError(f"sought a module returned by papr_fx.transform(), found {type(gm).__name__}{hint}")


def _checked_images(gm: PrunedModule, images: object) -> Tensor:
    shape, layout = gm.plan.shape, gm.plan.layout
    axis = layout.index("C")
    free = gm.plan.dynamic and isinstance(images, Tensor) and images.ndim == len(layout) and images.shape[axis] == shape[axis]
    if not isinstance(images, Tensor) or not (free or images.shape[1:] == shape[1:]):
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        axes = ", ".join(layout.replace("C", str(shape[axis])))
        raise ArgumentError(f"images must be a tensor ({axes}) such as (1, {', '.join(map(str, shape[1:]))}), not {found}")
    return images


@torch.no_grad()
def _chosen(module: PrunedModule, images: Tensor) -> list[tuple[Choice, Tensor, Tensor]]:
    """For each choice the map (B, h, w) and the indices (B, prefix + k); at z=1 such as at another ratio."""
    plan = module.plan if module.plan.z < 1 else replace(module.plan, z=0.5)
    graph = plan.rewrite(module.training)
    nodes = {node.name: node for node in graph.nodes}
    choices = plan.choices(module.training)
    wanted = [nodes[f"{name}{choice.suffix}"] for choice in choices for name in ("papr_psm", "papr_keep")]
    values = cut(module, graph, *wanted)(_checked_images(module, images))
    return list(zip(choices, values[::2], values[1::2], strict=True))


@torch.no_grad()
def significance(gm: fx.GraphModule, images: Tensor) -> Tensor:
    """The proposal's significance maps, before they are resized to the token grid (PaPr, Eq. 2).

    Args:
        gm: A module returned by `transform`.
        images: (B, C, H, W), or clips as the model takes them, normalised as it expects.

    Returns:
        (B, h, w), of clips (B, t, h, w), float32 or wider.

    Raises:
        ArgumentError: `gm` was not transformed, or `images` has another rank or channel count.
    """
    module = checked_module(gm)
    return module.papr_proposal(_checked_images(module, images))


@torch.no_grad()
def keep_masks(gm: fx.GraphModule, images: Tensor) -> dict[Grid, Tensor]:
    """Which positions are kept, for each grid in use (PaPr, Eq. 3).

    Args:
        gm: A module returned by `transform`.
        images: (B, C, H, W), or clips as the model takes them, normalised as it expects.

    Returns:
        For each grid (h, w) a boolean mask (B, h, w), of clips (t, h, w) and (B, t, h, w), True where kept; all True at z=1.

    Raises:
        ArgumentError: `gm` was not transformed, or `images` has another rank or channel count.
    """
    module = checked_module(gm)
    masks: dict[Grid, Tensor] = {}
    for choice, psm, keep in _chosen(module, images):
        kept = keep[:, choice.prefix :] - choice.prefix  # (B, k)
        mask = torch.zeros_like(psm, dtype=torch.bool).flatten(1).scatter_(1, kept, True).view_as(psm)  # (B, h, w)
        masks[tuple(psm.shape[1:])] = mask if module.plan.z < 1 else torch.ones_like(mask)
    return masks


def restore_grid(gm: fx.GraphModule, tokens: Tensor, images: Tensor, *, fill: float | Tensor = 0.0) -> Tensor:
    """Puts the kept tokens of a headless model back in their places on the grid, for dense heads.

    Args:
        gm: A token model returned by `transform`, such as with `output="features"`.
        tokens: What it made of `images`: (B, prefix + k, C), or (B, k, C) without prefix tokens; all tokens at z=1.
        images: (B, C, H, W), the same. The choice is made again, so the precision must be the same too: under autocast if
            the tokens were had under it.
        fill: What stands at dropped positions: a number, or a vector (C,) such as a mask token.

    Returns:
        (B, C, h, w) on the model's token grid, of clips (B, C, t, h, w).

    Raises:
        ArgumentError: `gm` is no transformed token model, or `tokens` are not those that it keeps of `images`.
    """
    module = checked_module(gm)
    if module.plan.operator.mode != "tokens":
        raise ArgumentError("restore_grid is for token models: pixel operators are written back to their grids already")
    if module.plan.reduction and module.plan.reduction.r:
        raise ArgumentError(
            "restore_grid: tokens were merged or dropped from block to block, so they have no places of their own"
        )
    ((choice, psm, keep),) = _chosen(module, images)
    grid, prefix = psm.shape[1:], choice.prefix
    places = keep[:, prefix:] - prefix  # (B, k)
    if module.plan.z == 1:
        places = torch.arange(grid.numel(), device=keep.device).expand(len(keep), -1)
    batch, kept = places.shape
    found = tuple(tokens.shape) if isinstance(cast(object, tokens), Tensor) else ()
    if len(found) != 3 or found[0] != batch or found[1] not in (kept, prefix + kept):
        raise ArgumentError(
            f"tokens must be (B, {prefix} + {kept}, C) or (B, {kept}, C) for these images, not {found or type(tokens).__name__}"
        )
    patches = tokens[:, tokens.shape[1] - kept :]
    whole = torch.as_tensor(fill, dtype=tokens.dtype, device=tokens.device)
    if tuple(whole.shape) not in ((), (found[2],)):
        raise ArgumentError(f"fill must be a number or a vector ({found[2]},), not {tuple(whole.shape)}")
    whole = whole.expand(batch, grid.numel(), found[2])
    restored = whole.scatter(1, places.unsqueeze(-1).expand_as(patches), patches)  # (B, h * w, C)
    return restored.transpose(1, 2).reshape(batch, -1, *grid)


def sibling(gm: PrunedModule, **changes: Any) -> PrunedModule:
    """Another module over the same children and tensors, with `changes` to its plan; `gm` stays as it is."""
    return PrunedModule(shell(gm), replace(gm.plan, **changes))


def set_keep_ratio(gm: fx.GraphModule, z: float) -> None:
    """Re-targets a transformed module in place, to and from 1.0 (where its graph is the dense model's).

    A module already given to `torch.compile` is compiled again at its next call.

    Args:
        gm: A module returned by `transform`.
        z: Share of the tokens to keep, in (0, 1].

    Raises:
        ArgumentError: `gm` was not transformed, or `z` is out of range.
    """
    checked_module(gm).retarget(checked_z(z))
