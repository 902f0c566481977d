"""The significance network: images to maps, frozen, with the images resized and normalised for the proposal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..versions import is_transformed


@dataclass(frozen=True)
class Preparation:
    """How images are prepared for a proposal.

    Attributes:
        layout: Axes of the images or clips: BCHW, BCTHW or BTCHW.
        per_frame: Whether the proposal takes the frames of clips as images; else it takes clips (B, C, T, H, W).
        size: Images are first resized to it, in pixels: the shorter side, or (rows, columns), or (frames, rows, columns).
        renormalise: Scale and shift per channel, (C, 1, 1), from the model's normalisation to the proposal's.
        statistics: The same in words, for `report`.
        doubt: Why images may be normalised for the model only; empty if both statistics are known, or neither.
    """

    layout: str = "BCHW"
    per_frame: bool = False
    size: int | tuple[int, ...] | None = None
    renormalise: tuple[Tensor, Tensor] | None = None
    statistics: str = ""
    doubt: str = ""


class SignificanceNet(nn.Module):
    """Maps images (B, C, H, W) to significance maps (B, h, w): the mean of a ConvNet's last feature maps (PaPr, Eq. 2).

    Clips (B, C, T, H, W) or (B, T, C, H, W) become maps (B, t, h, w). A network of images gives (B, T, h, w), frame by frame.

    It is frozen: its parameters have become buffers, and it stays in eval mode when `train` is called.

    Attributes:
        weights: How many numbers those hold.
    """

    fine = False  # whether its maps have the resolution of the images, so that they are averaged over patches
    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, trunk: nn.Module, saliency: nn.Module, preparation: Preparation) -> None:
        """Freezes both parts.

        Args:
            trunk: Images to features.
            saliency: (features, images, trunk) to maps; see `build_map`.
            preparation: How images are prepared.
        """
        super().__init__()
        self.trunk = trunk
        self.saliency = saliency
        self.layout = preparation.layout
        self.per_frame = preparation.per_frame
        self.size = preparation.size
        self.statistics = preparation.statistics
        self.doubt = preparation.doubt
        scale, shift = preparation.renormalise or (None, None)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.requires_grad_(False)
        self.weights = _freeze(self)
        self.eval()
        self.register_load_state_dict_post_hook(_ignore_missing)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns nothing: checkpoints hold the model only, and `transform` takes the proposal."""
        destination = args[0] if args else kwargs.get("destination")
        return {} if destination is None else destination

    def train(self, mode: bool = True) -> SignificanceNet:
        """Stays in eval mode: the proposal is frozen (`mode` is ignored)."""
        return cast(SignificanceNet, super().train(False))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        plain = images if images.is_floating_point() else images.new_empty(0).float()
        like = next((tensor for tensor in _weights(self.trunk) if tensor.is_floating_point()), plain)
        images = images.to(like.dtype)  # bytes, or images that the model itself converts
        if self.layout == "BCTHW":
            images = images.transpose(1, 2)  # channels before rows and columns, as in the other layouts
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
        # vmap and grad of torch.func know no other memory format than the usual one.
        if torch.compiler.is_compiling() or not is_transformed():
            images = images.contiguous(memory_format=packed)
        maps: Tensor = self.saliency(self.trunk(images), images, self.trunk)
        return maps.unflatten(0, (-1, frames)) if self.per_frame else maps


def takes_clips(network: nn.Module) -> bool:
    """Whether a network takes clips: it has 3-D convolutions."""
    return any(isinstance(module, nn.Conv3d) for module in network.modules())


def resized(shape: Sequence[int], size: int | tuple[int, ...]) -> tuple[int, ...]:
    """The shape (H, W) or (T, H, W) after resizing to `size`.

    One number sets the shorter side and keeps the aspect; (rows, columns) leave the number of frames as it is.
    """
    *frames, rows, columns = shape
    if isinstance(size, tuple):
        return (*frames, *size) if len(size) < len(shape) else size
    shorter = min(rows, columns)
    return (*frames, round(rows * size / shorter), round(columns * size / shorter))


def _freeze(network: nn.Module) -> int:
    """Makes the parameters of a network buffers that are not part of its state. Returns how many numbers they hold.

    Others match parameters and `state_dict` by name, as what offloads weights does, and it has none of these. As buffers they
    move with `.to()`, while optimisers, `fully_shard` and whatever makes all parameters trainable leave them alone.
    """
    frozen: dict[nn.Parameter, Tensor] = {}  # tied ones stay one tensor
    for module in network.modules():
        if isinstance(module, torch.jit.ScriptModule):  # its code finds them where they are
            continue
        for name, parameter in [*module._parameters.items()]:
            if parameter is not None:
                del module._parameters[name]
                module._buffers[name] = frozen.setdefault(parameter, parameter.detach())
        module._non_persistent_buffers_set.update(module._buffers)
    return sum(tensor.numel() for tensor in frozen.values())


def _weights(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()  # of scripted modules
    yield from network.buffers()


def _ignore_missing(network: nn.Module, keys: Any) -> None:
    """Checkpoints hold nothing of the proposal, so none of its keys is missing."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if "papr_proposal." not in key]
