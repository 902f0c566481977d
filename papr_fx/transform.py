"""The one call: trace, find the sites, splice the proposal, prove."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from .errors import ArgumentError, NoSiteError, SiteError, VerifyError
from .passes.reduce_tokens import Reduction
from .planning import inputs
from .planning.by_pixels import keeps_space, prune_by_pixels
from .planning.by_tokens import prune_by_tokens
from .planning.module import PrunedModule, checked_z
from .proof.prove import prove
from .proposals.build import ImageSpec, ProposalOptions, build_proposal
from .proposals.network import SignificanceNet
from .proposals.saliency import Saliency, checked_saliency
from .proposals.statistics import InputStats
from .review.diff import graph_text
from .tracing.fakes import MODEL_ERRORS, scratch_copy


def transform(
    model: nn.Module,
    proposal: nn.Module | str,
    z: float,
    *,
    example_input: Tensor | None = None,
    mode: Literal["auto", "tokens", "pixels"] = "auto",
    background: Literal["auto", "keep", "zero"] = "auto",
    proposal_size: int | tuple[int, ...] | None = None,
    input_stats: InputStats = "auto",
    saliency: Saliency = "psm",
    merge: Reduction | None = None,
    output: Literal["logits", "features"] = "logits",
    verify: bool = True,
) -> PrunedModule:
    """Rewrites a vision model so that it computes for the most significant patches alone (PaPr, ECCV 2024, Sec. 3).

    The model is traced to a graph and a significance network is made of `proposal`. In a ViT the kept tokens are gathered in
    front of the first block; in a hierarchical model (ConvNeXt, Swin) each block's pixel operator runs on the kept positions
    and is written back among zeros. `model` itself is not changed; the result shares its tensors.

    Args:
        model: A classifier of images (B, C, H, W), or of clips (B, C, T, H, W) or (B, T, C, H, W), in eval or training mode.
        proposal: A light ConvNet classifier (its head is dropped), a module that returns a feature map (B, K, h, w) or a
            map (B, h, w), or the name of one in timm, torchvision.models.video or pytorchvideo.models.hub, whose pretrained
            weights are then loaded. For clips, a ConvNet of 3-D convolutions that takes (B, C, T, H, W), or one of images,
            which then sees each frame alone.
        z: Share of all tokens to keep, in (0, 1]: `int(N * z)` patches beside the prefix tokens, N counting both; or
            `int(h * w * z)` positions of each grid, times t of clips. At 1 the result is the traced model.
        example_input: Images such as the model takes, of which only the shape matters. Default: what the model states.
        mode: "tokens" gathers tokens in front of the blocks, "pixels" prunes residual pixel operators; "auto" takes tokens
            where that is sound, else pixels.
        background: What stands at dropped positions behind a pixel operator: "keep" leaves the residual, "zero" zeroes it
            too, "auto" zeroes behind depthwise convolutions, and keeps elsewhere and in training. Token models have none.
        proposal_size: Shorter side in pixels, or (rows, columns), to which images are resized for the proposal, bilinear; of
            clips also (frames, rows, columns), trilinear.
        input_stats: "auto" re-normalises images for the proposal where the (mean, std) of both networks are known and
            differ, "shared" hands them over as they are, ((mean, std) of the model, (mean, std) of the proposal) says both.
        saliency: Source of the map: "psm", the mean over the proposal's last feature maps, or these weighed by its classifier:
            "expected-cam" by class probability, "cam" and "gradcam" for the best class, "scorecam" (a forward pass a map);
            "random", a baseline; or a function of features (B, K, h, w) that returns maps (B, h, w).
        merge: `Merge(r, blocks, proportional)`: token merging in some blocks of a token model, behind the pruning, or alone
            with z=1. Or one of its peers in `papr_fx.peers`.
        output: "logits", what the model returns, or "features", what its `forward_features` does (timm): of a token model
            the kept tokens (B, prefix + k, C), which `restore_grid` puts back in their places.
        verify: Whether to prove the rewrite on the model before returning it; `VerifyError` if it fails.

    Returns:
        A `torch.fx.GraphModule` that torch.compile takes.

    Raises:
        ArgumentError: An argument is out of range or of the wrong kind.
        ProposalError: `proposal` yields no significance map.
        TraceError: The model's forward cannot be recorded, or refuses these images.
        NoSiteError: The model has no place where pruning is sound.
        VerifyError: The rewritten model failed its proof.
    """
    keep_ratio = checked_z(z)
    model = inputs.checked_model(model)
    model = inputs.with_output(model, inputs.checked_word("output", output, inputs.OUTPUTS))
    inputs.checked_word("mode", mode, inputs.MODES)
    inputs.checked_word("background", background, inputs.BACKGROUNDS)
    saliency = checked_saliency(saliency)
    mode = _checked_merge(merge, mode)
    images = inputs.example_images(model, example_input)
    layout = inputs.layout_of(model, images)
    size = inputs.checked_size(proposal_size, images)
    if images.is_meta and verify:
        raise ArgumentError("model has no weights (meta device), so nothing can be proved on it: pass verify=False")

    _run_once(model, images)

    def finished(gm: PrunedModule) -> PrunedModule:
        gm.plan = replace(gm.plan, output=output)
        if gm.plan.z != keep_ratio:
            gm.retarget(keep_ratio)
        if os.environ.get("PAPR_FX_DEBUG") == "1":
            print(graph_text(gm.graph))
        if verify:
            _prove_all(model, gm)
        return gm

    @cache
    def network() -> SignificanceNet:
        options = ProposalOptions(size, input_stats, saliency, verify)
        return build_proposal(proposal, model, ImageSpec.of(images, layout), options)

    some = min(keep_ratio, 0.9)
    if mode == "pixels":
        return finished(prune_by_pixels(model, images, layout, network, some, background))
    try:
        return finished(prune_by_tokens(model, images, layout, network, some, merge))
    except (NoSiteError, VerifyError) as error:
        if mode == "tokens":
            raise
        try:
            gm = prune_by_pixels(model, images, layout, network, some, background)
        except NoSiteError as other:
            raise type(error)(f"{error}\nAs for pixels: {other}") from other
        if not keeps_space(model, gm):
            hint = "mode='pixels' would prune its MLPs alone, where that is sound"
            raise type(error)(f"{error} ({hint})") from error
    return finished(gm)


def _checked_merge(merge: object, mode: Literal["auto", "tokens", "pixels"]) -> Literal["auto", "tokens", "pixels"]:
    """The mode, which is that of tokens where these are merged."""
    if merge is None:
        return mode
    if isinstance(merge, type) or not isinstance(merge, Reduction):
        raise ArgumentError(f"merge must be papr_fx.Merge(r=8), or a peer of it in papr_fx.peers, not {merge!r}")
    if mode == "pixels":
        raise ArgumentError("merge: pixel operators have no tokens to merge; leave mode at 'auto'")
    return "tokens"


def _prove_all(model: nn.Module, gm: PrunedModule) -> None:
    """Proves `gm`; pixel operators whose positions are not in order, or do not matter, are left alone, if others are not."""
    while True:
        try:
            prove(model, gm)
        except SiteError as error:
            if not error.merges or not gm.leave_alone(error.merges, str(error)):
                raise
        else:
            return


def _run_once(model: nn.Module, images: Tensor) -> None:
    """Runs the model on one real image first: code that caches tensors by size must not cache fake ones."""
    copied = scratch_copy(model).eval()
    if not images.is_meta:
        with (
            torch.no_grad(),
            torch.random.fork_rng(),
            suppress(*MODEL_ERRORS),
        ):  # tracing meets the same error, and names its node
            copied(images[:1])
