"""Class activation maps: feature maps weighted by what the proposal's classifier makes of them.

Each module maps (features, images, trunk) to maps, as `saliency` says.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad

from ..errors import ProposalError
from ..ops import wide
from ..tracing.numerics import exact_float32, relative_error

_MASKS_PER_PASS = 32  # of one image, in Score-CAM


class ClassActivation(nn.Module):
    """Maps weighted as the classifier does for its best class (CAM; Zhou et al., CVPR 2016), or for all, by probability."""

    weights: Tensor

    def __init__(self, classifier: nn.Module, weights: Tensor, axis: int, *, expected: bool) -> None:
        """Takes the classifier, its `class_weights`, the channel axis, and whether to weigh all classes by probability."""
        super().__init__()
        self.classifier = classifier
        self.axis = axis
        self.expected = expected
        self.register_buffer("weights", weights, persistent=False)  # (classes, K)

    def forward(self, features: Tensor, images: Tensor, trunk: nn.Module) -> Tensor:
        logits = self.classifier(features)  # (B, classes)
        if self.expected:
            weights = logits.softmax(-1, dtype=wide(logits)).to(self.weights.dtype) @ self.weights
        else:
            weights = self.weights[logits.argmax(-1)]
        return _weighted_sum(features, weights, self.axis)


class GradCAM(nn.Module):
    """Maps weighted by the gradient of the best class, averaged over positions (Selvaraju et al., ICCV 2017).

    The ReLU at its end is left out: it would make all positions that speak against the class equal.
    """

    def __init__(self, classifier: nn.Module, axis: int) -> None:
        """Takes the classifier and the channel axis of its features."""
        super().__init__()
        self.classifier = classifier
        self.axis = axis

    def forward(self, features: Tensor, images: Tensor, trunk: nn.Module) -> Tensor:
        def best(values: Tensor) -> Tensor:
            return self.classifier(values).amax(-1).sum()

        gradients: Tensor = grad(best)(features)
        return _weighted_sum(features, gradients.movedim(self.axis, 1).flatten(2).mean(-1), self.axis)


class ScoreCAM(nn.Module):
    """Maps weighted by the softmax of the best class's scores for the image masked by each map (Wang et al., CVPRW 2020).

    It needs a forward pass for each of the K maps: for comparisons, not for speed. The ReLU is left out, as in `GradCAM`.
    """

    def __init__(self, classifier: nn.Module, axis: int) -> None:
        """Takes the classifier and the channel axis of its features."""
        super().__init__()
        self.classifier = classifier
        self.axis = axis

    def forward(self, features: Tensor, images: Tensor, trunk: nn.Module) -> Tensor:
        maps = features.movedim(self.axis, 1)  # (B, K, *grid)
        flat = maps.flatten(2)
        flat = flat - flat.amin(-1, keepdim=True)
        flat = flat / flat.amax(-1, keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny)
        best = self.classifier(features).argmax(-1, keepdim=True)  # (B, 1)
        parts = flat.view_as(maps).split(_MASKS_PER_PASS, dim=1)
        scores = torch.cat([self._scores(images, masks, best, trunk) for masks in parts], dim=1)
        return _weighted_sum(features, scores.softmax(-1, dtype=wide(scores)), self.axis)

    def _scores(self, images: Tensor, masks: Tensor, labels: Tensor, trunk: nn.Module) -> Tensor:
        """Scores (B, m) of classes (B, 1) for images (B, C, *size) multiplied by each of their masks (B, m, *grid)."""
        mode = "bilinear" if images.ndim == 4 else "trilinear"
        masks = F.interpolate(masks, size=images.shape[2:], mode=mode, align_corners=False)
        masked = (images.unsqueeze(1) * masks.unsqueeze(2)).flatten(0, 1)  # (B * m, C, *size)
        packed = torch.channels_last if images.ndim == 4 else torch.channels_last_3d
        logits = self.classifier(trunk(masked.contiguous(memory_format=packed)))
        return logits.unflatten(0, masks.shape[:2]).gather(2, labels.unsqueeze(1).expand(-1, masks.shape[1], 1)).squeeze(2)


def class_weights(features: Tensor, classifier: nn.Module, axis: int, name: str) -> Tensor:
    """The weights (classes, K) of a classifier that averages its features and applies one linear layer.

    Args:
        features: Features of one image. Only their shape, dtype and device matter.
        classifier: Features to logits (B, classes).
        axis: The channel axis of the features.
        name: Class name of the proposal, for messages.

    Raises:
        ProposalError: The classifier does more than that; its output on random features shows it.
    """
    channels = features.movedim(axis, 1).shape[1]
    layers = [m for m in classifier.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)]
    if len(layers) == 1 and layers[0].weight.flatten(1).shape[1] == channels:
        weights, bias = layers[0].weight.detach().flatten(1), layers[0].bias
        random = torch.Generator("cpu").manual_seed(0)
        drawn = torch.randn((2, *features.shape[1:]), generator=random, device="cpu").to(features.device, features.dtype)
        pooled = drawn.movedim(axis, 1).flatten(2).mean(-1)
        with torch.no_grad(), exact_float32():
            if relative_error(classifier(drawn), F.linear(pooled, weights, bias)) < 1e-3:
                return weights
    raise ProposalError(
        f"saliency: class activation maps are for networks that average their features and apply one linear layer, and the "
        f'proposal ({name}) does more: pass saliency="gradcam", or "psm"'
    )


def _weighted_sum(features: Tensor, weights: Tensor, axis: int) -> Tensor:
    """The sum of feature maps, each times its weight of (B, K): (B, *grid)."""
    maps = features.movedim(axis, 1).to(wide(features))  # (B, K, *grid)
    return (weights.unsqueeze(1).to(maps.dtype) @ maps.flatten(2)).view(maps.shape[0], *maps.shape[2:])
