"""Rewrites a random model and compares it with its oracle."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import papr_fx
from papr_fx import PaprError, PrunedModule

from . import proposals
from .blocks import Mlp
from .draw import Built, build, images_of, unfit_head
from .grids import PixelMlp
from .spec import Spec
from .traps import HARMLESS
from .views import UndefinedError, UnjudgedError, View, dense_view, token_view

TOLERANCE = 1e-8
Verdict = Literal["equal", "refused", "unjudged", "needless", "finding", "broken"]


@dataclass(frozen=True)
class Result:
    """What became of a model.

    Attributes:
        verdict: "equal" to the oracle; "refused" with a `PaprError`; "unjudged", as the oracle does not say what is right;
            "needless", a refusal of a plain model; "finding", a fault; "broken", a fault of the oracle.
        reason: Why, or where.
        error: The largest relative error.
        mode: "tokens" or "pixels" if it was rewritten.
    """

    verdict: Verdict
    reason: str = ""
    error: float = 0.0
    mode: str = ""


class Rewritten(NamedTuple):
    """A rewritten model, and what its report says.

    Attributes:
        gm: The model.
        mode: "tokens" or "pixels".
        sites: The names of the branches that were pruned by pixels.
    """

    gm: PrunedModule
    mode: str
    sites: list[str]


class FaultError(Exception):
    """The rewritten model gives something else than the oracle."""


@torch.no_grad()
def judge(spec: Spec, *, strict: bool = False) -> Result:
    """Rewrites the model of a description, and compares it with the oracle.

    Args:
        spec: The description.
        strict: Whether traps count that only a proof would see, where the description asks for none.
    """
    built = build(spec)
    broken = _self_check(spec, built)
    if broken:
        return Result("broken", broken)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", papr_fx.StatisticsWarning)
            gm = _transformed(spec, built)
    except PaprError as error:
        return _refused(spec, error)
    except Exception as error:  # whatever else transform raises is a fault
        return Result("finding", f"transform: {_first_line(error)}")
    found = _compared(spec, built, gm)
    if found.verdict == "finding" and not strict and not spec.verify and excuses(spec):
        return replace(found, verdict="unjudged", reason="a trap, without proof")
    return found


def _compared(spec: Spec, built: Built, gm: PrunedModule) -> Result:
    """What becomes of a model that was rewritten."""
    mode = gm.plan.kind
    sites = [site.name for site in papr_fx.report(gm).sites] if mode == "pixels" else []
    try:
        error = max(_errors(spec, built, Rewritten(gm, mode, sites)))
    except UndefinedError as undefined:
        return Result("finding", f"accepted: {undefined}", mode=mode)
    except UnjudgedError as unjudged:
        return Result("unjudged", str(unjudged), mode=mode)
    except FaultError as fault:
        return Result("finding", str(fault), mode=mode)
    except Exception as other:  # the rewritten model does not run
        return Result("finding", f"run: {_first_line(other)}", mode=mode)
    if not error <= TOLERANCE:
        return Result("finding", "differs", error, mode)
    return Result("equal", "", error, mode)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _transformed(spec: Spec, built: Built) -> PrunedModule:
    options: dict[str, Any] = {"mode": spec.mode, "background": spec.background, "restore": spec.restore}
    if spec.saliency == "squares":
        options["saliency"] = proposals.squares
    if spec.merge:
        options["merge"] = papr_fx.Merge(spec.merge, blocks="all", proportional=spec.proportional)
    if spec.proposal_size:
        options["proposal_size"] = spec.proposal_size
    return papr_fx.transform(
        built.model,
        built.proposal,
        spec.z,
        example_input=built.images[:1],
        narrow=spec.narrow,
        fuse=spec.fuse,
        verify=spec.verify,
        **options,
    )


def _refused(spec: Spec, error: PaprError) -> Result:
    """A refusal, which is needless where nothing excuses it."""
    reason = re.sub(r"`[^`]*`", "`...`", _first_line(error))
    reason = re.sub(r"\d[\d.e+-]*", "#", reason)[:160]
    return Result("refused" if excuses(spec) else "needless", reason)


def excuses(spec: Spec) -> list[str]:
    """Why a model may be refused."""
    if not spec.on_tokens:
        wrong: list[str | bool] = [
            spec.layout == "BNC" and spec.depth == 1 and "a single operator on positions in a row",
            spec.pixel_trap == "whole batch" and "the batch size is read as a number",
            spec.mode == "tokens" and "grids have no tokens",
            spec.background == "coarse" and "grids have no coarse cells",
        ]
        return [str(excuse) for excuse in wrong if excuse]
    found = [unfit_head(spec)] if unfit_head(spec) else []
    found += ["merging"] if spec.merge else []
    found += [name for name in (trap.partition(":")[0] for trap in spec.traps) if name not in HARMLESS]
    if spec.mode == "pixels" or spec.background in ("keep", "zero"):
        found.append("pixel operators of a token model")
    if spec.attention in ("causal", "linear", "softmax over queries", "rectified"):
        found.append(f"attention: {spec.attention}")
    if spec.inner != "none" and spec.patches < spec.prefix + spec.suffix + 3:
        found.append("too few patches to tell their number from that of other tokens")
    if spec.embed in ("stem", "overlap"):
        found.append("patches so small that their neighbours move more")
    if spec.embed == "column-major":
        found.append("column-major tokens")
    if spec.reversed_attention:
        found.append("reversed tokens in front of an attention")
    if spec.background == "coarse":
        if spec.embed in ("stem", "overlap") or spec.images == "each normalised":
            found.append("patches see each other")
        if spec.inner in ("mask", "distance") or spec.second:
            found.append("tables without a mean")
        if any("Numbered" in trap for trap in spec.traps):
            found.append("tables in modules")
    return found


def _self_check(spec: Spec, built: Built) -> str:
    """Why the oracle is wrong without any pruning; empty if it is right."""
    view = dense_view(spec.batch, spec.grid, spec.prefix if spec.on_tokens else 0, spec.suffix if spec.on_tokens else 0)
    try:
        expected = built.model.seen(built.images, view)
    except (UndefinedError, UnjudgedError):
        return ""
    error = relative_error(built.model(built.images), expected)
    return "" if error <= TOLERANCE else f"the oracle is off by {error:.1e} without pruning"


def _errors(spec: Spec, built: Built, pruned: Rewritten) -> Iterator[float]:
    """The relative errors of the rewritten model: at its keep ratio, on one image, at another ratio, at another size."""
    yield _error(spec, built, pruned, built.images, spec.z)
    yield _error(spec, built, pruned, built.images[:1], spec.z)
    if spec.then_z and not spec.merge:  # it may leave too few tokens to merge
        papr_fx.set_keep_ratio(pruned.gm, spec.then_z)
        yield _error(spec, built, pruned, built.images, spec.then_z)
        papr_fx.set_keep_ratio(pruned.gm, spec.z)
    if spec.other_size and takes_other_sizes(spec):
        step = 2 if spec.on_tokens else 4
        grid = tuple(size + step * (axis + 1) for axis, size in enumerate(spec.grid))
        other = replace(spec, grid=grid)
        images = images_of(other, other.image, torch.Generator().manual_seed(spec.seed + 1))
        try:
            pruned.gm(images)
        except PaprError:
            return
        yield _error(other, built, pruned, images, spec.z)


def takes_other_sizes(spec: Spec) -> bool:
    """Whether the model, and its oracle, take images of any size."""
    if not spec.on_tokens:
        return not spec.pixel_trap and spec.layout != "BNC" and spec.pixel_block != "global" and spec.trunk != "clip"
    fixed = spec.traps or spec.inner != "none" or spec.positions not in ("none", "waves", "resampled") or len(spec.grid) == 3
    heads = ("class", "last", "all", "mean", "largest", "deviation", "pool", "sequence", "tuple", "dataclass")
    return not fixed and spec.head in heads and not spec.second and spec.embed in ("convolution", "stem", "overlap")


def _error(spec: Spec, built: Built, pruned: Rewritten, images: Tensor, z: float) -> float:
    if any("Remembering" in trap for trap in spec.traps):
        raise UnjudgedError("an output that depends on the number of calls")
    found = pruned.gm(images)
    if z == 1 and not spec.merge:
        if not all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(built.model(images)), strict=True)):
            raise FaultError("at z=1 the result is not the model to the bit")
        return 0.0
    masks = papr_fx.keep_masks(pruned.gm, images)
    maps = proposals.maps_by_hand(spec, built.proposal, images)
    coarse = z < 1 and pruned.mode == "tokens" and spec.background == "coarse"
    groups: list[list[list[int]]] = []
    others = spec.prefix + spec.suffix if spec.on_tokens else 0
    for grid, mask in masks.items():
        scores = proposals.resized(maps, grid)
        if coarse:
            groups = [proposals.groups_by_hand(sample, z, others) for sample in scores]
            fine = [sorted(group[0] for group in sample if len(group) == 1) for sample in groups]
            held = [[int(i) for i in sample.flatten().nonzero()[:, 0]] for sample in mask]
            if any(not set(h) <= set(f) for h, f in zip(held, fine, strict=True)):
                raise FaultError("coarse: fine patches are not those of the best cells")
            continue
        counted = others if pruned.mode == "tokens" else 0  # of pixel operators, z is the share of the grid
        count = proposals.count_by_hand(mask[0].numel(), z, counted)
        if not proposals.are_best(scores, mask, count):
            raise FaultError("the kept positions are not the best of the map")
        groups = [[[int(i)] for i in sample.flatten().nonzero()[:, 0]] for sample in mask]
    if pruned.mode == "tokens":
        view = token_view(groups, spec.grid, spec.prefix, spec.suffix, spec.restore)
        view = replace(view, merge=spec.merge, proportional=spec.proportional)
        halved = proposals.halved(images, spec.grid, spec.patch) if coarse else None
    else:
        view, halved = _pixel_view(spec, built, pruned, masks, len(images)), None
    return relative_error(found, built.model.seen(images, view, halved))


def _pixel_view(spec: Spec, built: Built, pruned: Rewritten, masks: dict[tuple[int, ...], Tensor], batch: int) -> View:
    """The view in which the pixel operators that the report names work on kept positions."""
    prefix, suffix = (spec.prefix, spec.suffix) if spec.on_tokens else (0, 0)
    layers = {_last_layer(built.model.get_submodule(name)): _background(spec, name) for name in pruned.sites}
    floats = {grid: mask.double() for grid, mask in masks.items()}
    return replace(dense_view(batch, spec.grid, prefix, suffix), masks=floats, pruned=layers)


def _last_layer(module: nn.Module) -> nn.Module:
    """The last layer of an operator, which may be named as a whole."""
    return module.last if isinstance(module, Mlp | PixelMlp) else module


def _background(spec: Spec, name: str) -> str:
    """What dropped positions of an operator should hold."""
    if spec.background in ("keep", "zero"):
        return spec.background
    first = name.split(".")[:2] == ["stages", "0"]
    convolved = spec.trunk == "conv" or (spec.trunk == "hybrid" and first)
    inside = spec.pixel_trap == "depthwise" and name.split(".")[2:4] == [str(spec.depth - 1), "mlp"] and first
    return "zero" if convolved or inside else "keep"


def tensors(value: Any) -> list[Tensor]:
    """All tensors of an output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for part in value.values() for t in tensors(part)]
    if isinstance(value, list | tuple):
        return [t for part in value for t in tensors(part)]
    if is_dataclass(value):
        return [t for field in fields(value) for t in tensors(getattr(value, field.name))]
    return []


def relative_error(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest expected value; infinite if the shapes differ."""
    pairs = list(zip(tensors(found), tensors(expected), strict=False))
    if len(tensors(found)) != len(tensors(expected)) or not pairs or any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    errors = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs]
    return float("nan") if any(error != error for error in errors) else max(errors)
