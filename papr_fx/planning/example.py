"""Images like those that a model was traced with: they follow the model to another dtype and device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..tracing.asked import like_images


@dataclass(frozen=True)
class Example:
    """What images a model was traced with.

    Attributes:
        shape: Their shape.
        dtype: Their dtype.
        device: Their device.
        like: Name of a parameter on their device; empty if the model has none.
        follows: Whether that parameter has their dtype too.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    like: str = ""
    follows: bool = False

    @classmethod
    def of(cls, model: nn.Module, images: Tensor) -> Example:
        """The example that `images` are, with which `model` was traced."""
        name, parameter = like_images(model, images) or ("", images)
        return cls(tuple(images.shape), images.dtype, images.device, name, parameter.dtype == images.dtype)

    def images(self, model: nn.Module) -> Tensor:
        """Uninitialised images for `model` in its present dtype and on its present device."""
        if not self.like:
            return torch.empty(self.shape, dtype=self.dtype, device=self.device)
        like = model.get_parameter(self.like)
        return torch.empty(self.shape, dtype=like.dtype if self.follows else self.dtype, device=like.device)
