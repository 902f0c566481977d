"""The one call, to be read top to bottom: check the arguments, plan by tokens or by pixels, prove.

Planning traces the model and finds the sites. The graph is rewritten where the planned module is built, see `PrunedModule`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from torch import Tensor, nn

from .errors import ArgumentError, NoSiteError, SiteError, StatisticsWarning, VerifyError
from .passes.prune_tokens import SeveralTrunksError
from .passes.reduction import Reduction
from .passes.restore_places import FILLS
from .planning import inputs
from .planning.by_pixels import PixelOptions, keeps_space, prune_by_pixels
from .planning.by_tokens import TokenOptions, prune_by_tokens
from .planning.module import PrunedModule, checked_z
from .proof.fusing import FusingError
from .proof.narrowing import NarrowingError
from .proof.prove import prove
from .proof.sizes import SizesError
from .proposals.build import ImageSpec, ProposalOptions, build_proposal, check_proposal
from .proposals.network import SignificanceNet
from .proposals.saliency import Saliency, checked_saliency
from .proposals.statistics import InputStats, checked_stats
from .review.stages import print_stages
from .tracing.results import shared_results
from .tracing.surroundings import no_collection, plain_contexts
from .tracing.trunk import Trunk, find_trunk

Mode = Literal["auto", "tokens", "pixels"]
Background = Literal["auto", "keep", "zero", "drop", "coarse"]


def transform(
    model: nn.Module,
    proposal: nn.Module | str | None,
    z: float,
    *,
    example_input: Tensor | None = None,
    mode: Mode = "auto",
    background: Background = "auto",
    proposal_size: int | tuple[int, ...] | None = None,
    input_stats: InputStats = "auto",
    saliency: Saliency = "psm",
    merge: Reduction | None = None,
    output: Literal["logits", "features"] = "logits",
    narrow: bool = True,
    fuse: bool = True,
    restore: Literal["nearest", "zero"] = "nearest",
    verify: bool = True,
) -> PrunedModule:
    """Rewrites a vision model to compute only for the most significant patches (PaPr, ECCV 2024, Sec. 3).

    A ViT gathers the kept tokens before its first block; the pixel operators of a ConvNeXt or Swin run on kept positions.
    `model` itself is not changed; the result shares its tensors.

    Args:
        model: A classifier of images (B, C, H, W), or of clips (B, C, T, H, W) or (B, T, C, H, W), in either mode.
        proposal: A light ConvNet classifier (its head is dropped), a module that returns features (B, K, h, w) or a map
            (B, h, w), or a name in timm (`hf-hub:`, `local-dir:` too), torchvision.models.video or pytorchvideo (with weights).
            For clips, a 3-D ConvNet that takes (B, C, T, H, W), or one for images, which sees each frame independently. None
            with saliency="motion".
        z: Share of tokens to keep, in (0, 1]: `int(N * z)` patches beside the other tokens, where N counts both; or
            `int(h * w * z)` positions per grid, times t for clips. At 1 the result is the traced model.
        example_input: Images such as the model takes; only the shape matters. Default: the size that the model states.
        mode: "tokens" gathers tokens, "pixels" prunes pixel operators, "auto" takes tokens where that is sound, else pixels.
        background: What becomes of dropped positions. Pixel operators: "keep" leaves the residual, "zero" zeroes it, "auto"
            zeroes after depthwise convolutions, except in training, and keeps elsewhere. Tokens: "drop" (which "auto" is)
            drops them; "coarse" gives each cell of 2 x 2 dropped patches back as one token, within the same number of tokens
            (ours, beyond the paper).
        proposal_size: Images are resized to it for the proposal: the shorter side in pixels, or (rows, columns), bilinear;
            for clips also (frames, rows, columns), trilinear.
        input_stats: "auto" re-normalises images for the proposal where both networks' (mean, std) are known and differ,
            "shared" leaves them as they are, ((mean, std) of the model, (mean, std) of the proposal) gives both. What "auto"
            reads, and where it warns: see `papr_fx.proposals.statistics`.
        saliency: Source of the map: "psm", the mean over the proposal's last feature maps; "expected-cam", "cam", "gradcam",
            "scorecam", which weight them by its classes; "random"; or a function of features (B, K, h, w) to maps (B, h, w).
            For clips also "motion", the change from frame to frame without a proposal, and its product with the map of a
            proposal: `"motion*psm"`, `"motion*cam"` and so on.
        merge: `Merge(r, blocks, proportional, schedule=...)`: token merging after the pruning, or alone with z=1. Or a peer.
        output: "logits", what the model returns, or "features", what its `forward_features` (timm) returns.
        narrow: Whether to compute only those rows of the last tokens that are read: in most ViTs the class token's. Exact;
            `report` says where. Off at z=1.
        fuse: Whether attention that is written out, as in the windows of Swin, becomes one call of
            `scaled_dot_product_attention` in eval mode. Equal up to rounding. Off at z=1.
        restore: What dropped places hold where a model lays its tokens out as their grid for more than pooling, as dense heads
            do, or returns them so: "nearest", the nearest kept token, or "zero".
        verify: Whether to prove the rewrite on the model before returning it.

    Raises:
        ArgumentError: An argument is out of range or of the wrong kind.
        ProposalError: `proposal` yields no saliency map.
        TraceError, NoSiteError: The model's forward cannot be recorded, or has no place where pruning is sound; with a coarse
            background also: patches see each other before the first block, as in a convolutional stem.
        VerifyError: The rewritten model failed its proof.
    """
    options = _Options(checked_z(z), mode, background, merge, output, narrow, fuse, restore, verify).checked()
    request = inputs.checked_request(model, output, example_input, with_weights=verify)
    size = inputs.checked_size(proposal_size, request.images)
    spec = ImageSpec.of(request.images, request.layout)
    sight = ProposalOptions(size, checked_stats(input_stats, spec.channels), checked_saliency(saliency), verify)
    check_proposal(proposal, spec, sight)
    network = cache(lambda: build_proposal(proposal, request.model, spec, sight))
    gm = _Pipeline(request, network, options).run()
    if doubt := gm.papr_proposal.doubt:
        warnings.warn(doubt, StatisticsWarning, stacklevel=2)
    return gm


@dataclass(frozen=True)
class _Options:
    """How a model is rewritten. See `transform`."""

    z: float
    mode: Mode
    background: str
    merge: Reduction | None
    output: str
    narrow: bool
    fuse: bool
    restore: str
    verify: bool

    def checked(self) -> _Options:
        """The same options, with the mode that merging asks for; `ArgumentError` if one is wrong."""
        inputs.checked_word("mode", self.mode, inputs.MODES)
        inputs.checked_word("background", self.background, inputs.BACKGROUNDS)
        inputs.checked_word("restore", self.restore, FILLS)
        return replace(self, mode=_checked_background(self.background, self.merge, _checked_merge(self.merge, self.mode)))


@dataclass(frozen=True)
class _Pipeline:
    """Plans, rewrites and proves: by tokens where that is sound, otherwise by pixels."""

    request: inputs.Request
    network: Callable[[], SignificanceNet]
    options: _Options

    def run(self) -> PrunedModule:
        """The rewritten model, whatever contexts the caller is in."""
        with plain_contexts(self.request.images.device), shared_results():
            with no_collection():
                trunk = find_trunk(self.request.model, self.request.images)
            return self._proved(trunk)

    def _proved(self, trunk: Trunk) -> PrunedModule:
        if self.options.mode == "pixels":
            return self._finished(self._by_pixels())
        try:
            return self._finished(self._checked_tokens(self._by_tokens(trunk)))
        except (NoSiteError, VerifyError) as error:
            if self.options.mode == "tokens" or isinstance(error, SeveralTrunksError):
                raise
            gm = self._instead(error, trunk)
            reason = str(error).splitlines()[0]
        return self._finished(gm, fallback=reason)

    @property
    def _planning_z(self) -> float:
        """A keep ratio at which there is something to plan."""
        return min(self.options.z, 0.9)

    def _by_tokens(self, trunk: Trunk) -> PrunedModule:
        background = self.options.background
        coarse, restore = background == "coarse", self.options.restore
        wanted = TokenOptions(
            self._planning_z, self.options.merge, self.options.narrow, coarse, restore, fuse=self.options.fuse
        )
        try:
            with no_collection():
                return prune_by_tokens(self.request, trunk, self.network, wanted)
        except NoSiteError as error:
            if trunk.spatial and background in inputs.TOKEN_BACKGROUNDS:
                hint = f"background={background!r} is for models that run on tokens; leave it at 'auto'"
                raise NoSiteError(f"{error} ({hint})") from error
            raise

    def _checked_tokens(self, gm: PrunedModule) -> PrunedModule:
        """The module, or `ArgumentError` if its background is one of pixel operators."""
        background = self.options.background
        if background in inputs.PIXEL_BACKGROUNDS:
            raise ArgumentError(
                f"background={background!r} is for pixel operators, and {gm.plan.name} is pruned by tokens: leave it at "
                "'auto', which drops them, or pass 'coarse'; mode='pixels' prunes pixel operators, where that is sound"
            )
        return gm

    def _by_pixels(self) -> PrunedModule:
        with no_collection():
            options = PixelOptions(self._planning_z, self.options.background, self.options.fuse)
            return prune_by_pixels(self.request, self.network, options)

    def _instead(self, error: NoSiteError | VerifyError, trunk: Trunk) -> PrunedModule:
        """The model pruned by pixels, where it cannot be pruned by tokens because of `error`; otherwise raises that."""
        try:
            gm = self._by_pixels()
        except NoSiteError as other:
            raise type(error)(f"{error}\nAs for pixels: {other}") from other
        if not keeps_space(self.request.model, gm, trunk.blocks):
            hint = "mode='pixels' would prune its MLPs only, where that is sound"
            raise type(error)(f"{error} ({hint})") from error
        return gm

    def _finished(self, gm: PrunedModule, fallback: str = "") -> PrunedModule:
        """The module at the keep ratio asked for, proved."""
        gm.plan = replace(gm.plan, output=self.options.output, fallback=fallback)
        gm.plan.at(self.options.z)  # refuses what takes more tokens than are left
        if gm.plan.z != self.options.z:
            gm.retarget(self.options.z)
        if os.environ.get("PAPR_FX_DEBUG") == "1":
            print_stages(gm)
        if self.options.verify:
            _prove(self.request.model, gm)
        return gm


def _prove(model: nn.Module, gm: PrunedModule) -> None:
    """Proves `gm`. Pixel operators with positions out of order, or without effect, become dense again if others are left.

    Where it cannot be proved that nobody reads what is left out, all patches are embedded, then all rows computed. Where fused
    attention cannot be proved, it is written out. Where the graph does not hold for images of other sizes, these are refused.
    """
    while True:
        try:
            prove(model, gm)
        except NarrowingError as error:
            gm.follow(gm.plan.computing_more(str(error)))
        except FusingError as error:
            gm.follow(gm.plan.writing_out(str(error)))
        except SizesError:
            gm.follow(gm.plan.of_one_size())
        except SiteError as error:
            if not error.additions or not gm.leave_dense(error.additions, str(error)):
                raise
        else:
            return


def _checked_background(background: str, merge: Reduction | None, mode: Mode) -> Mode:
    """The mode: that of tokens for their backgrounds."""
    other = {"pixels": inputs.TOKEN_BACKGROUNDS, "tokens": inputs.PIXEL_BACKGROUNDS}.get(mode, ())
    if background in other:
        raise ArgumentError(f"background={background!r} does not fit {mode}: leave it at 'auto', or choose another mode")
    if background == "coarse" and merge is not None and merge.needs_places:
        raise ArgumentError(
            f"merge: {type(merge).__name__} connects patches that touch in the image, and a coarse token stands for several: "
            "pass papr_fx.Merge, or background='drop'"
        )
    return "tokens" if background in inputs.TOKEN_BACKGROUNDS else mode


def _checked_merge(merge: object, mode: Mode) -> Mode:
    """The mode: that of tokens where these are merged."""
    if merge is None:
        return mode
    if isinstance(merge, type) or not isinstance(merge, Reduction):
        raise ArgumentError(f"merge must be papr_fx.Merge(r=8), or a peer of it in papr_fx.peers, not {merge!r}")
    if mode == "pixels":
        raise ArgumentError("merge: pixel operators have no tokens to merge; leave mode at 'auto'")
    return "tokens"
