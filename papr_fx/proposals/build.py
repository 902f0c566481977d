"""Builds a significance network from any ConvNet: cut before its global pooling, frozen, fused, in channels-last memory.

The dataflow says where to cut, not the model's name: the features are the last value that keeps the two spatial axes of
images (PaPr, Sec. 3.1: the last convolutional layer, after its activation), or the three axes of clips. The classifier after
the pooling is dropped: the paper's map has uniform class weights. A network of images serves clips too, frame by frame.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from ..errors import ArgumentError, ProposalError
from ..versions import is_compiled
from .depthwise import replace_depthwise
from .motion import MotionNet
from .named import create_network
from .network import Preparation, SignificanceNet, resized, takes_clips
from .planar import replace_planar
from .pointwise import replace_pointwise
from .saliency import Saliency, build_map, parts_of
from .split import split_network
from .statistics import InputStats, Network, Renormalisation, renormalisation


@dataclass(frozen=True)
class ImageSpec:
    """The images that a model takes.

    Attributes:
        layout: Axes of a batch: BCHW, BCTHW or BTCHW.
        shape: Shape of a batch.
        dtype: Their dtype.
        device: Their device, which the significance network moves to, unless it is meta.
    """

    layout: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, images: Tensor, layout: str = "BCHW") -> ImageSpec:
        """The specification of images like these."""
        return cls(layout, tuple(images.shape), images.dtype, images.device)

    @property
    def network_dtype(self) -> torch.dtype:
        """The dtype of a network for them: theirs, or float32 for bytes."""
        return self.dtype if self.dtype.is_floating_point else torch.float32

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.shape[self.layout.index("C")]

    @property
    def extent(self) -> tuple[int, ...]:
        """Sizes (H, W), or (T, H, W) of clips."""
        return tuple(size for size, letter in zip(self.shape, self.layout, strict=True) if letter in "THW")

    @property
    def clips(self) -> bool:
        """Whether they are clips."""
        return "T" in self.layout


@dataclass(frozen=True)
class ProposalOptions:
    """How a proposal is used: arguments of `transform`.

    Attributes:
        size: `proposal_size`.
        input_stats: "auto", "shared" or ((mean, std) of the model, (mean, std) of the proposal); see `checked_stats`.
        saliency: The source of the map.
        verify: Whether to compare the fused network with the one given.
    """

    size: int | tuple[int, ...] | None = None
    input_stats: InputStats = "auto"
    saliency: Saliency = "psm"
    verify: bool = True


def build_proposal(proposal: object, model: nn.Module, images: ImageSpec, options: ProposalOptions) -> SignificanceNet:
    """Builds the significance network of `proposal` for the images that `model` takes. `proposal` itself is not changed.

    Args:
        proposal: A ConvNet classifier; a module that returns a feature map (B, K, h, w) or a map (B, h, w); or a name that
            `create_network` knows, whose pretrained weights are then loaded. For clips, a network with 3-D convolutions takes
            (B, C, T, H, W) and returns features (B, K, t, h, w) or a map (B, t, h, w); any other network takes the frames.
            None where the map is motion alone.
        model: The target. Only its normalisation statistics are read.
        images: What the target takes.
        options: How the proposal is used.

    Raises:
        ProposalError: `proposal` yields no significance map; the message says why.
        VerifyError: Fusing the proposal changed its output.
    """
    moving, source = parts_of(options.saliency)
    network = None if source is None else _network(proposal, model, images, replace(options, saliency=source))
    return MotionNet(images.layout, network) if moving or network is None else network


def check_proposal(proposal: object, images: ImageSpec, options: ProposalOptions) -> None:
    """Raises `ArgumentError` if the source of the map does not go with the proposal, or with the images."""
    moving, source = parts_of(options.saliency)
    named = f"saliency={options.saliency!r}"
    if moving and not images.clips:
        raise ArgumentError(f"{named} is the change from frame to frame, and the model takes images {images.shape}, no clips")
    if moving and images.extent[0] < 2:
        raise ArgumentError(f"{named} is the change from frame to frame, and clips {images.shape} have one frame")
    if source is None and proposal is not None:
        raise ArgumentError(
            f'{named} uses no proposal: pass proposal=None, or saliency="motion*psm" to multiply it with the proposal\'s map'
        )
    if source is None and (options.size is not None or options.input_stats != "auto"):
        raise ArgumentError(f"{named} uses no proposal, so proposal_size and input_stats have no effect: leave them out")


def _network(proposal: object, model: nn.Module, images: ImageSpec, options: ProposalOptions) -> SignificanceNet:
    source = _load(proposal)
    network = _merged_copy(source)
    clips = takes_clips(network)
    if clips and not images.clips:
        raise ProposalError(
            f"proposal ({type(source).__name__}) takes clips, but the model takes images {images.shape}: pass a network of "
            "images"
        )
    sample = _sample(network, images, options.size)
    halves = split_network(network, source, sample, verify=options.verify)
    target = Network(model, torch.empty(images.shape, dtype=images.dtype, device=images.device), images.layout.index("C"))
    normalised = renormalisation(target, Network(source, sample, 1), options.input_stats)
    maps = build_map(options.saliency, halves, sample, type(source).__name__)
    trunk = halves.trunk
    if images.device.type != "meta":
        trunk, maps = (part.to(device=images.device, dtype=images.network_dtype) for part in (trunk, maps))
    _lay_out(trunk, torch.channels_last_3d if clips else torch.channels_last)
    doubt = _doubt(normalised, classifies=halves.classifier is not None)
    scaling = _as_images(normalised.factors, images)
    per_frame = images.clips and not clips
    preparation = Preparation(images.layout, per_frame, options.size, scaling, normalised.words, doubt)
    return SignificanceNet(trunk, maps, preparation)


def _doubt(normalised: Renormalisation, *, classifies: bool) -> str:
    """Why the proposal may get images that are not normalised for it. A network that is no classifier takes what it gets."""
    if not normalised.unknown or (normalised.unknown == "proposal" and not classifies):
        return ""
    return (
        f"input_stats: mean and std are {normalised.words}. Pass input_stats=((mean, std) of the model, (mean, std) of the "
        'proposal), or input_stats="shared" if that is meant'
    )


def _load(proposal: object) -> nn.Module:
    """The network of that name, or a module that holds weights on one device."""
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
            f"proposal must be a ConvNet (torch.nn.Module) or the name of a timm model, not {type(proposal).__name__}; only "
            'saliency="motion" does without one, on clips'
        )
    if isinstance(proposal, torch.jit.ScriptModule) or is_compiled(proposal):
        raise ProposalError(f"proposal is a {type(proposal).__name__}: pass the plain module that it was made from")
    tensors = [*proposal.parameters(), *proposal.buffers()]
    if any(t.is_meta for t in tensors):
        raise ProposalError("proposal has no weights (meta device): load them before transform()")
    if len({t.device for t in tensors}) > 1:
        raise ProposalError(f"proposal lies on several devices ({', '.join(sorted({str(t.device) for t in tensors}))})")
    return proposal


def _merged_copy(source: nn.Module) -> nn.Module:
    """A copy in eval mode that owns its weights, its multi-branch blocks merged into single convolutions."""
    try:
        with torch.inference_mode(False), torch.no_grad():
            return reparameterize_model(copy.deepcopy(source).eval(), inplace=True)
    except (TypeError, RuntimeError) as error:
        raise ProposalError(f"proposal ({type(source).__name__}) holds something that cannot be copied: {error}") from error


def _sample(network: nn.Module, images: ImageSpec, size: int | tuple[int, ...] | None) -> Tensor:
    """One empty image or clip as the network takes it, with the dtype and device of its weights."""
    extent = images.extent if size is None else resized(images.extent, size)
    weights = next((t for t in [*network.parameters(), *network.buffers()] if t.is_floating_point()), None)
    dtype, device = (images.network_dtype, images.device) if weights is None else (weights.dtype, weights.device)
    return torch.empty((1, images.channels, *(extent if takes_clips(network) else extent[-2:])), dtype=dtype, device=device)


def _as_images(renormalise: tuple[Tensor, Tensor] | None, images: ImageSpec) -> tuple[Tensor, Tensor] | None:
    """Scale and shift (C, 1, 1), in the dtype of the network for the images and on their device."""
    if renormalise is None:
        return None
    device = None if images.device.type == "meta" else images.device
    scale, shift = (t.to(device, images.network_dtype).view(-1, 1, 1) for t in renormalise)
    return scale, shift


def _lay_out(trunk: nn.Module, memory_format: torch.memory_format) -> None:
    """Lays out the kernels channels-last, as the images are, and replaces convolutions that have a faster form."""
    ndim = 4 if memory_format == torch.channels_last else 5
    for tensor in (*trunk.parameters(), *trunk.buffers()):
        if tensor.ndim == ndim:
            tensor.data = tensor.data.contiguous(memory_format=memory_format)
    replace_depthwise(trunk)
    replace_pointwise(trunk)
    replace_planar(trunk)
