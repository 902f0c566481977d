"""Draws a description from its number, and builds the model, the proposal and the images of a description."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from . import heads, traps
from .attention import UNUSUAL
from .grids import GridModel
from .proposals import Proposal
from .spec import Spec
from .tokens import TokenModel

_T = TypeVar("_T")
INNER = (
    "rotary", "rotary, four axes", "rotary of all", "queries", "keys", "values", "bias", "bias of keys", "bias of queries",
    "relative", "distance", "mask",
)  # fmt: skip
PIXEL_TRAPS = (
    "group norm", "batch norm", "squeeze", "depthwise", "softmax", "roll", "flip", "transpose", "table", "response",
    "in place", "dropout", "cumulative sum", "neighbour", "count",
)  # fmt: skip


class Built(NamedTuple):
    """A model, its proposal, and images that it takes, all in float64."""

    model: TokenModel | GridModel
    proposal: Proposal
    images: Tensor


FOR_IMAGES = "a head for images"


def draw(number: int) -> Spec:
    """The description of that number: the same on every machine."""
    rng = random.Random(number)
    trunk = rng.choices(["vit", "clip", "conv", "windows", "hybrid"], [60, 8, 11, 13, 8])[0]
    spec = Spec(seed=number, trunk=trunk, width=rng.choice([8, 8, 12]), batch=rng.choice([2, 3]))
    spec = _with_options(rng, _on_tokens(rng, spec) if spec.on_tokens else _on_grids(rng, spec))
    return _with_proposal(rng, spec)


def _mostly(rng: random.Random, plain: _T, *others: _T, share: float = 0.5) -> _T:
    """The plain choice, or with some probability one of the others."""
    return rng.choice(others) if rng.random() < share else plain


def _on_tokens(rng: random.Random, spec: Spec) -> Spec:
    clip = spec.trunk == "clip"
    grid = (rng.randint(2, 3), rng.randint(2, 3), rng.randint(2, 3)) if clip else (rng.randint(2, 5), rng.randint(2, 5))
    prefix, suffix = rng.choice([0, 1, 1, 1, 2, 3]), _mostly(rng, 0, 1, 2, share=0.2)
    unfit = {kind: unfit_head(replace(spec, prefix=prefix, suffix=suffix, head=kind, grid=grid)) for kind in heads.KINDS}
    fitting = [kind for kind, why in unfit.items() if not why]
    running = [kind for kind, why in unfit.items() if why != FOR_IMAGES]
    spec = replace(
        spec,
        grid=grid,
        patch=rng.choice([(4, 4), (3, 4), (2, 3), (4, 2)]),
        depth=_mostly(rng, 2, 1, 3, share=0.2),
        prefix=prefix,
        suffix=suffix,
        embed="convolution" if clip else _mostly(rng, "convolution", "reshape", "unfold", "overlap", "stem", "column-major"),
        positions=_mostly(rng, "table", "table of patches", "axes", "waves", "none", share=0.6),
        head=rng.choice(fitting if rng.random() < 0.9 else running),
        images=_mostly(rng, "", "each normalised", "constants", share=0.15),
        body=_mostly(rng, "list", "sequential", "named", "two parts", "called twice", "sequence first", share=0.4),
        early=rng.random() < 0.1,
    )
    if spec.embed in ("convolution", "stem") and not clip and rng.random() < 0.15:
        spec = replace(spec, positions="resampled")
    if spec.body == "two parts" and spec.depth == 1:
        spec = replace(spec, body="list")
    if not clip and rng.random() < 0.08:
        spec = replace(spec, second=True)
    spec = _with_attention(rng, spec, INNER)
    spec = replace(
        spec,
        block=_mostly(rng, "pre", "post", "parallel", share=0.35),
        mlp=_mostly(rng, "gelu", "gated", "convolutions", "normalised", share=0.4),
        scale=rng.random() < 0.25,
        reversed_attention=rng.random() < 0.05,
        traps=_traps(rng, spec.depth),
    )
    return _merging(rng, spec) if rng.random() < 0.07 else spec


def _merging(rng: random.Random, spec: Spec) -> Spec:
    """The same with merging, and without what it is refused with."""
    return replace(
        spec,
        merge=rng.randint(1, 3),
        proportional=rng.random() < 0.6,
        head=rng.choice(["class", "mean", "all", "class and mean"] if spec.prefix else ["mean", "all"]),
        attention=rng.choice(["fused", "library", "library, sequence first"]),
        block=rng.choice(["pre", "pre", "post"]),
        body="list" if spec.body == "called twice" else spec.body,
        inner="none",
        traps=(),
        early=False,
        second=False,
        reversed_attention=False,
    )


def _traps(rng: random.Random, depth: int) -> tuple[str, ...]:
    count = rng.choices([0, 1, 2], [45, 42, 13])[0]
    names = rng.sample(sorted(traps.KINDS), count)
    places = ["between", "inside"] if depth > 1 else ["inside"]  # behind the last block they would be part of the head
    return tuple(f"{name}:{rng.choice(places)}" for name in names)


def _with_attention(rng: random.Random, spec: Spec, inner: tuple[str, ...]) -> Spec:
    usual = ("written", "einsum", "scaled queries", "library", "library, sequence first")
    attention = _mostly(rng, "fused", *usual, share=0.6) if rng.random() < 0.88 else rng.choice(UNUSUAL)
    positions = attention not in UNUSUAL or attention == "cosine"
    return replace(
        spec,
        attention=attention,
        project=_mostly(rng, "qkv", "chunk", "separate", "keys and values", "convolution"),
        inner="none" if attention.startswith("library") or not positions else _mostly(rng, "none", *inner, share=0.4),
    )


def _on_grids(rng: random.Random, spec: Spec) -> Spec:
    sizes = (4, 8) if spec.trunk == "windows" else (4, 5, 6, 7)
    spec = replace(
        spec,
        grid=(rng.choice(sizes), rng.choice(sizes)),
        patch=rng.choice([(4, 4), (2, 2), (3, 2)]),
        depth=rng.choice([1, 2]),
        layout=rng.choice(["BCHW", "BHWC", "BNC"] if spec.trunk == "windows" else ["BCHW", "BHWC"]),
        down=_mostly(rng, "convolution", "merging", "pooling", share=0.6),
        body=_mostly(rng, "list", "called twice", share=0.1),
        scale=rng.random() < 0.4,
        head=_mostly(rng, "all", "grid", share=0.25),
        pixel_trap=_mostly(rng, "", *PIXEL_TRAPS, share=0.6),
    )
    if spec.trunk == "windows":
        trap = "whole batch" if rng.random() < 0.12 else spec.pixel_trap
        spec = replace(spec, pixel_block="window", pixel_trap=trap)
    elif spec.trunk == "hybrid":
        spec = replace(spec, pixel_block=rng.choice(["global", "separable", "convolution", "pooling"]))
    return _with_attention(rng, spec, ("bias", "relative"))


def _with_options(rng: random.Random, spec: Spec) -> Spec:
    spec = replace(
        spec,
        z=rng.choice([0.1, 0.25, 0.33, 0.4, 0.5, 0.6, 0.75, 0.9]) if rng.random() < 0.96 else 1.0,
        then_z=_mostly(rng, 0.0, 0.2, 0.45, 0.7, 1.0, share=0.3),
        mode=_mostly(rng, "auto", "tokens", "pixels", share=0.12),
        narrow=rng.random() < 0.85,
        fuse=rng.random() < 0.85,
        restore=_mostly(rng, "nearest", "zero", share=0.25),
        verify=rng.random() < 0.92,
    )
    usual = ("drop", "coarse", "coarse", "coarse") if spec.on_tokens else ("keep", "zero")
    unusual = ("keep",) if spec.on_tokens else ("coarse",)
    background = _mostly(rng, "auto", *(usual if rng.random() < 0.95 else unusual), share=0.3)
    return replace(spec, background=background, other_size=rng.random() < 0.3)


def _with_proposal(rng: random.Random, spec: Spec) -> Spec:
    kinds = ("strided", "classifier", "map") if spec.trunk != "clip" else ("strided", "classifier", "clips")
    kind = _mostly(rng, "features", *kinds)
    size = _mostly(rng, 0, 7, 10, share=0.15) if kind != "clips" else 0
    saliency = "squares" if kind != "map" and rng.random() < 0.15 else "psm"
    return replace(spec, proposal=kind, proposal_size=size, saliency=saliency)


def unfit_head(spec: Spec) -> str:
    """Why a head has no meaning once tokens are dropped; empty if it has one."""
    if spec.head in ("class", "class and mean", "tuple", "dictionary") and not spec.prefix:
        return "the head reads the first patch"
    if spec.head == "distilled" and spec.prefix < 2:
        return "the head reads the first patches"
    if spec.head == "last" and not spec.suffix:
        return "the head reads the last patch"
    if spec.head in ("picked", "flat", "mean of fixed rows", "last rows"):
        return "the head reads tokens by their index"
    if spec.head in ("dense", "upsampled", "pooled grid") and len(spec.grid) == 3:
        return FOR_IMAGES
    return ""


def build(spec: Spec) -> Built:
    """The model, the proposal and the images of a description; torch's own random state is left alone."""
    generator = torch.Generator().manual_seed(spec.seed)
    with torch.random.fork_rng(devices=[]):
        made = TokenModel(spec) if spec.on_tokens else GridModel(spec)
        proposal = Proposal(spec.proposal)
    for network in (made, proposal):
        network.double().eval()
        _enliven(network, generator)
    return Built(made, proposal, images_of(spec, spec.image, generator))


def images_of(spec: Spec, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random images of a size."""
    return torch.randn((spec.batch, 3, *size), generator=generator, dtype=torch.float64)


@torch.no_grad()
def _enliven(network: nn.Module, generator: torch.Generator) -> None:
    """Draws every parameter at a scale at which faults show."""
    for parameter in network.parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 and parameter.shape[0] > 1 else 1
        drawn = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.copy_(drawn * 1.2 / max(1, fan) ** 0.5)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=buffer.dtype) * 0.5)
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype) + 0.5)
