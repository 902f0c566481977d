"""Any ConvNet classifier as a significance network: cut before its global pooling, frozen, fused, channels-last.

Where to cut is read from the dataflow, not from a model's name: the features are the last value that still has the
images' two spatial axes (PaPr, Sec. 3.1: the last convolutional layer, after its activation), or the three of clips. The
classifier behind the pooling is dropped, which is the paper's replacement of its class weights by uniform ones. A network
of images serves clips too, on each frame alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.utils.model import reparameterize_model
from torch import Tensor, fx, nn

from ..errors import ArgumentError, ProposalError, TraceError, VerifyError
from ..tracing.fakes import TRACED_BATCH, fake_like, faking, scratch_copy
from ..tracing.graphs import cut, descendants
from ..tracing.numerics import exact_float32, relative_error
from ..tracing.trace import Traced, trace
from .depthwise import replace_depthwise
from .features import find_cut
from .fold import fold_batch_norms, kernel_size
from .named import create_network
from .planar import replace_planar
from .saliency import Saliency, build_map, classifier_behind

Statistics = tuple[Sequence[float], Sequence[float]]
InputStats = Literal["auto", "shared"] | tuple[Statistics, Statistics]


class SignificanceNet(nn.Module):
    """Images (B, C, H, W) to significance maps (B, h, w): of a ConvNet's last feature maps, the mean (PaPr, Eq. 2) or another.

    Clips (B, C, T, H, W) or (B, T, C, H, W) become maps (B, t, h, w), or (B, T, h, w) by a network of images.

    Frozen: its parameters take no gradient and it stays in eval mode whatever `train` is asked for.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        trunk: nn.Module,
        saliency: nn.Module,
        *,
        layout: str = "BCHW",
        per_frame: bool = False,
        size: int | tuple[int, ...] | None = None,
        renormalise: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Wraps a trunk.

        Args:
            trunk: Images to features.
            saliency: Features and images to maps; see `saliency`.
            layout: Axes of the images or clips: BCHW, BCTHW or BTCHW.
            per_frame: Whether the trunk takes the frames of clips as images; one of clips takes (B, C, T, H, W).
            size: Shorter side, or (rows, columns), to which images are resized first, in pixels; of clips also
                (frames, rows, columns).
            renormalise: Scale and shift per channel, (C, 1, 1), from the target's normalisation to the proposal's.
        """
        super().__init__()
        self.trunk = trunk
        self.saliency = saliency
        self.layout = layout
        self.per_frame = per_frame
        self.size = size
        scale, shift = renormalise or (None, None)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.requires_grad_(False)
        self.eval()
        self.register_load_state_dict_post_hook(_nothing_missing)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing: a transformed model's checkpoints are those of the model, and `transform` is given the proposal."""
        return kwargs.get("destination", {})

    def train(self, mode: bool = True) -> SignificanceNet:
        """Stays in eval mode: the proposal is frozen (`mode` is ignored)."""
        return cast(SignificanceNet, super().train(False))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if self.layout == "BCTHW":
            images = images.transpose(1, 2)  # as all else is (..., C, H, W)
        if self.scale is not None and self.shift is not None:
            images = images * self.scale + self.shift
        if "T" in self.layout:
            images = images.transpose(1, 2)  # (B, C, T, H, W)
        if self.size is not None:
            mode = "trilinear" if "T" in self.layout else "bilinear"
            images = F.interpolate(images, size=resized(images.shape[2:], self.size), mode=mode, align_corners=False)
        frames = images.shape[2]
        if self.per_frame:
            images = images.transpose(1, 2).flatten(0, 1)  # (B * T, C, H, W)
        packed = torch.channels_last if images.ndim == 4 else torch.channels_last_3d
        images = images.contiguous(memory_format=packed)
        maps: Tensor = self.saliency(self.trunk(images), images, self.trunk)
        return maps.unflatten(0, (-1, frames)) if self.per_frame else maps


def _nothing_missing(network: nn.Module, keys: Any) -> None:
    """Checkpoints hold nothing of the proposal."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if "papr_proposal." not in key]


def build_proposal(
    proposal: object,
    model: nn.Module,
    images: Tensor,
    *,
    layout: str = "BCHW",
    size: int | tuple[int, ...] | None,
    input_stats: InputStats,
    saliency: Saliency = "psm",
    verify: bool,
) -> SignificanceNet:
    """Makes a significance network of `proposal` for the images that `model` takes. `proposal` itself is not changed.

    Args:
        proposal: A ConvNet classifier, a module that returns a feature map (B, K, h, w) or a map (B, h, w), or the name of
            a timm model, whose pretrained weights are then loaded. For clips, one of 3-D convolutions takes them as
            (B, C, T, H, W) and returns features (B, K, t, h, w) or a map (B, t, h, w); any other takes their frames as images.
        model: The target, for its normalisation statistics, dtype and device.
        images: A batch such as the target takes.
        layout: Its axes: BCHW, BCTHW or BTCHW.
        size: See `SignificanceNet`.
        input_stats: "auto", "shared" or ((mean, std) of the target, (mean, std) of the proposal).
        saliency: See `transform`.
        verify: Whether to check the fused network against the one given.

    Raises:
        ProposalError: `proposal` yields no significance map; the message says why.
    """
    source = _load(proposal)
    network = _copied(source)
    channels = images.shape[layout.index("C")]
    statistics = _renormalisation(model, source, channels, input_stats)
    clips = takes_clips(network)
    if clips and "T" not in layout:
        raise ProposalError(
            f"proposal ({type(source).__name__}) takes clips, but the model takes images {tuple(images.shape)}: pass a "
            "network of images"
        )
    extent = tuple(size for size, letter in zip(images.shape, layout, strict=True) if letter in "THW")
    parameter = next((t for t in [*network.parameters(), *network.buffers()] if t.is_floating_point()), None)
    extent = resized(extent, size) if size is not None else extent
    device = images.device if parameter is None else parameter.device
    dtype = images.dtype if parameter is None else parameter.dtype
    sample = torch.empty((1, channels, *(extent if clips else extent[-2:])), dtype=dtype, device=device)
    parts = _parts(network, source, sample, verify=verify)
    trunk = parts.trunk
    weighed = build_map(saliency, trunk, parts.classifier, parts.channel_axis, sample, type(source).__name__)
    if images.device.type != "meta":
        trunk, weighed = (part.to(device=images.device, dtype=images.dtype) for part in (trunk, weighed))
    if statistics is not None:
        where = None if images.device.type == "meta" else images.device
        scale, shift = (t.to(where, images.dtype).view(-1, 1, 1) for t in statistics)
        statistics = scale, shift
    packed = torch.channels_last_3d if clips else torch.channels_last
    _pack(trunk, packed)
    replace_depthwise(trunk)
    replace_planar(trunk)
    return SignificanceNet(
        trunk,
        weighed,
        layout=layout,
        per_frame="T" in layout and not clips,
        size=size,
        renormalise=statistics,
    )


def takes_clips(network: nn.Module) -> bool:
    """Whether a network is one of clips: it has 3-D convolutions."""
    return any(isinstance(module, nn.Conv3d) for module in network.modules())


def resized(shape: Sequence[int], size: int | tuple[int, ...]) -> tuple[int, ...]:
    """(H, W) or (T, H, W) resized to `size`: what it leaves out stays; one number sets the shorter side, keeping the aspect."""
    *frames, rows, columns = shape
    if isinstance(size, tuple):
        return (*frames, *size) if len(size) < len(shape) else size
    shorter = min(rows, columns)
    return (*frames, round(rows * size / shorter), round(columns * size / shorter))


def _pack(trunk: nn.Module, packed: torch.memory_format) -> None:
    """Lays the kernels of a trunk's convolutions out channels-last, as its images are."""
    ndim = 4 if packed == torch.channels_last else 5
    for tensor in (*trunk.parameters(), *trunk.buffers()):
        if tensor.ndim == ndim:
            tensor.data = tensor.data.contiguous(memory_format=packed)


def _load(proposal: object) -> nn.Module:
    if isinstance(proposal, str):
        try:
            return create_network(proposal, pretrained=True)
        except (OSError, RuntimeError) as error:
            raise ProposalError(
                f"proposal: the pretrained weights of {proposal!r} could not be loaded ({type(error).__name__}: {error}). "
                "Load them where there is a network, or pass a module, such as timm.create_model(name, checkpoint_path=...)"
            ) from error
    if not isinstance(proposal, nn.Module):
        raise ProposalError(
            f"proposal must be a ConvNet (torch.nn.Module) or the name of a timm model, not {type(proposal).__name__}"
        )
    if isinstance(proposal, torch.jit.ScriptModule | torch._dynamo.OptimizedModule):
        raise ProposalError(f"proposal is a {type(proposal).__name__}: pass the plain module that it was made from")
    tensors = [*proposal.parameters(), *proposal.buffers()]
    if any(t.is_meta for t in tensors):
        raise ProposalError("proposal has no weights (meta device): load them before transform()")
    if len({t.device for t in tensors}) > 1:
        raise ProposalError(f"proposal lies on several devices ({', '.join(sorted({str(t.device) for t in tensors}))})")
    return proposal


def _copied(source: nn.Module) -> nn.Module:
    """An eval-mode copy that owns its weights, its multi-branch blocks merged into single convolutions."""
    try:
        with torch.inference_mode(False), torch.no_grad():
            return reparameterize_model(copy.deepcopy(source).eval(), inplace=True)
    except (TypeError, RuntimeError) as error:
        raise ProposalError(f"proposal ({type(source).__name__}) holds something that cannot be copied: {error}") from error


class _Parts(NamedTuple):
    """A network in two, images to features and features to logits, if it goes on so; and the axis of the channels."""

    trunk: nn.Module
    classifier: nn.Module | None
    channel_axis: int | None


def _parts(network: nn.Module, source: nn.Module, sample: Tensor, *, verify: bool) -> _Parts:
    try:
        traced, pooled = _traced(network, sample)
    except TraceError as error:
        return _whole(network, sample, error)
    gm = fx.GraphModule(traced.root(network), traced.graph)
    found = find_cut(gm, sample)
    with torch.no_grad():
        fold_batch_norms(gm)
    if verify:
        given = copy.deepcopy(source).eval()
        if pooled:
            _pool_globally(given, pooled)
        _check_fusion(gm, given, sample)
    return _Parts(cut(gm, gm.graph, found.features), classifier_behind(gm, found.features), found.channel_axis)


def _traced(network: nn.Module, sample: Tensor) -> tuple[Traced, str]:
    """Traces a network; if its last pooling was made for larger images, that pools all there is, and is named."""
    try:
        return trace(network, sample, _is_layered), ""
    except TraceError as error:
        name = error.module
        if not name or not _pool_globally(network, name):
            raise
        traced = trace(network, sample, _is_layered)
        (pool, *_) = traced.graph.find_nodes(op="call_module", target=name)
        gm = fx.GraphModule(traced.root(network), traced.graph)
        behind = {node.name for node in descendants(pool)}
        if any(prod(kernel_size(gm, node) or ()) > 1 for node in gm.graph.nodes if node.name in behind):
            raise
        return traced, name


def _pool_globally(network: nn.Module, name: str) -> bool:
    """Puts global average pooling in the place of an average pooling; False if the module is none."""
    kinds: dict[type[nn.Module], Any] = {nn.AvgPool2d: nn.AdaptiveAvgPool2d, nn.AvgPool3d: nn.AdaptiveAvgPool3d}
    kind = kinds.get(type(network.get_submodule(name)))
    if kind is not None:
        network.set_submodule(name, kind(1))
    return kind is not None


def _check_fusion(gm: fx.GraphModule, source: nn.Module, sample: Tensor) -> None:
    """Proves the merged and folded network equal to the one given, of which `source` is a copy, on one random image."""
    wide = torch.promote_types(sample.dtype, torch.float32)
    images = torch.randn(sample.shape, generator=torch.Generator().manual_seed(0)).to(sample.device, wide)
    with torch.no_grad(), exact_float32():
        expected = source.to(wide)(images)
        error = relative_error(copy.deepcopy(gm).to(wide)(images), expected)
    if not error < 1e-3:
        raise VerifyError(
            f"proposal ({type(source).__name__}): folding its batch norms and merging its branches changed its output by "
            f"{error:.1e} (relative; below 1e-3 was needed)"
        )


def _whole(network: nn.Module, sample: Tensor, error: TraceError) -> _Parts:
    """A network whose code cannot be traced serves as it is, if what it returns is a map."""
    mode, fake = fake_like(sample, TRACED_BATCH)
    copied = scratch_copy(network)
    try:
        with faking(mode):
            out: object = copied(fake)
    except Exception as refusal:
        raise ProposalError(f"proposal ({type(network).__name__}) refused images {tuple(fake.shape)}: {refusal}") from refusal
    ranks = (sample.ndim - 1, sample.ndim)  # without channels, and with
    if isinstance(out, Tensor) and out.ndim in ranks and out.shape[0] == TRACED_BATCH and min(out.shape[-2:]) > 1:
        return _Parts(network, None, None if out.ndim == ranks[0] else 1)
    raise ProposalError(
        f"proposal ({type(network).__name__}) returns no spatial map, and its features cannot be reached: {error}"
    )


def _is_layered(module: nn.Module, name: str) -> bool:
    """Everything but torch.nn's own layers is opened: the proposal is frozen, so nothing in it depends on the mode."""
    return not type(module).__module__.startswith("torch.nn.") or isinstance(module, nn.Sequential | nn.ModuleList)


def _renormalisation(model: nn.Module, proposal: nn.Module, channels: int, given: InputStats) -> tuple[Tensor, Tensor] | None:
    """Scale and shift, (C,) each, that turn images normalised for `model` into images normalised for `proposal`."""
    if given == "shared":
        return None
    if given == "auto":
        known = statistics_of(model), statistics_of(proposal)
        if known[0] is None or known[1] is None or any(len(part) != channels for pair in known for part in pair or ()):
            return None
        (mean, std), (own_mean, own_std) = cast("tuple[Statistics, Statistics]", known)
    else:
        (mean, std), (own_mean, own_std) = _checked_statistics(given, channels)
    if tuple(mean) == tuple(own_mean) and tuple(std) == tuple(own_std):
        return None
    m, s, own_m, own_s = (torch.tensor(tuple(v), dtype=torch.float64) for v in (mean, std, own_mean, own_std))
    return s / own_s, (m - own_m) / own_s


def statistics_of(module: nn.Module) -> Statistics | None:
    """Mean and std from timm's metadata; modules of torchvision and transformers carry none."""
    config = getattr(module, "pretrained_cfg", None)
    if isinstance(config, Mapping) and config.get("mean") and config.get("std"):
        return tuple(cast(Any, config)["mean"]), tuple(cast(Any, config)["std"])
    return None


def _checked_statistics(given: object, channels: int) -> tuple[Statistics, Statistics]:
    try:
        (mean, std), (own_mean, own_std) = cast(Any, given)
        lists = [[float(v) for v in part] for part in (mean, std, own_mean, own_std)]
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f'input_stats must be "auto", "shared" or ((mean, std) of the model, (mean, std) of the proposal), not {given!r}'
        ) from error
    if any(len(part) != channels for part in lists) or not all(0 < v < math.inf for v in lists[1] + lists[3]):
        raise ArgumentError(f"input_stats: each mean and std needs {channels} numbers, each std above 0; got {given!r}")
    return (lists[0], lists[1]), (lists[2], lists[3])
