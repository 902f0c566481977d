"""Where the significance of a position comes from: the proposal's feature maps, weighted in one way or another.

The paper's map is their mean, with the class weights of the proposal replaced by uniform ones (PaPr, Sec. 3.1). The others ask
the proposal's own classifier, and serve as its baselines (PaPr, Tab. 7). All are batched, and free of hooks and of backward
passes through the network, so that they run inside a compiled graph.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import grad

from ..errors import ArgumentError, ProposalError
from ..tracing.fakes import TRACED_BATCH
from ..tracing.graphs import ancestors, descendants
from ..tracing.numerics import exact_float32, relative_error

Named = Literal["psm", "expected-cam", "cam", "gradcam", "scorecam", "random"]
Saliency = Named | Callable[[Tensor], Tensor]
NAMES: tuple[Named, ...] = ("psm", "expected-cam", "cam", "gradcam", "scorecam", "random")

_PRIME = 2**31 - 1  # its square fits int64
# Maps of which Score-CAM masks one image at a time.
_MASKS = 32


def checked_saliency(saliency: object) -> Saliency:
    """Returns a name among `NAMES`, or a function of features; else raises `ArgumentError`."""
    if saliency in NAMES or (callable(saliency) and not isinstance(saliency, type)):
        return cast(Saliency, saliency)
    words = ", ".join(f'"{name}"' for name in NAMES)
    raise ArgumentError(f"saliency must be one of {words}, or a function of features (B, K, h, w), not {saliency!r}")


def build_map(
    saliency: Saliency, trunk: nn.Module, classifier: nn.Module | None, axis: int | None, sample: Tensor, name: str
) -> nn.Module:
    """A module that maps (features, images, trunk) to maps (B, h, w), of clips (B, t, h, w), float32 or wider.

    Args:
        saliency: A name, or a function of features with channels in axis 1.
        trunk: Images to features.
        classifier: Features to logits (B, classes); None if the network has none that can be reached.
        axis: The features' channel axis; None for maps without channels.
        sample: One image such as the trunk takes.
        name: Class name of the network, for messages.

    Raises:
        ProposalError: The network has no classifier, or none of the kind that is needed.
    """
    if saliency == "random":
        return _Random(axis)
    if axis is None:
        if saliency != "psm":
            raise ProposalError(f"saliency: the proposal ({name}) returns one map, so there are no features to weigh")
        return _Given()
    if saliency == "psm":
        return _Mean(axis)
    if not isinstance(saliency, str):
        own = copy.deepcopy(saliency) if isinstance(saliency, nn.Module) else saliency
        with torch.no_grad():
            return _checked(_Function(own, axis), trunk(sample), sample, trunk)
    if classifier is None:
        raise ProposalError(
            f'saliency="{saliency}" asks the classes of the proposal, but ({name}) returns features: pass a classifier'
        )
    if saliency == "gradcam":
        return _GradCAM(classifier, axis)
    if saliency == "scorecam":
        return _ScoreCAM(classifier, axis)
    return _CAM(classifier, _class_weights(trunk, classifier, axis, sample, name), axis, expected=saliency == "expected-cam")


def _checked(function: nn.Module, *given: Any) -> nn.Module:
    """Returns a user's function if it makes maps of features."""
    function(*given)
    return function


def classifier_behind(gm: fx.GraphModule, features: fx.Node) -> nn.Module | None:
    """The part of a network that maps its features to its output; None if that is nothing, or reads the images too."""
    output = gm.graph.output_node().args[0]
    if not isinstance(output, fx.Node) or output is features or len(output.meta.get("shape", ())) != 2:
        return None
    behind, needed = descendants(features), ancestors(output)
    graph = fx.Graph()
    copied = {features: graph.placeholder("features")}
    for node in gm.graph.nodes:
        if node is not features and node in needed and node not in behind and node.meta.get("value") == TRACED_BATCH:
            copied[node] = graph.call_method("size", (copied[features], 0))  # the batch, read from the images
            continue
        if node is features or node not in needed or not (node in behind or node.op == "get_attr"):
            continue
        if any(source not in copied for source in node.all_input_nodes):
            return None
        copied[node] = graph.node_copy(node, lambda n: copied[n])
    graph.output(copied[output])
    return fx.GraphModule(gm, graph)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _weighed(features: Tensor, weights: Tensor, axis: int) -> Tensor:
    """Feature maps weighed by channel, (B, K) weights, and summed: (B, *grid)."""
    maps = features.movedim(axis, 1).to(_wide(features))  # (B, K, *grid)
    return (weights.unsqueeze(1).to(maps.dtype) @ maps.flatten(2)).view(maps.shape[0], *maps.shape[2:])


class _Given(nn.Module):
    """Maps as they come."""

    def forward(self, features: Tensor, images: Tensor, trunk: nn.Module) -> Tensor:
        return features.to(_wide(features))


class _Mean(nn.Module):
    """The mean over channels (PaPr, Eq. 2)."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, features: Tensor, images: Tensor, trunk: nn.Module) -> Tensor:
        return features.mean(self.axis, dtype=_wide(features))


class _Random(nn.Module):
    """Scores that have nothing to do with a position's content, and are the same again for the same image."""

    def __init__(self, axis: int | None) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, features: Tensor, images: Tensor, trunk: nn.Module) -> Tensor:
        coarse = features.shape[1:] if self.axis is None else features.movedim(self.axis, 1).shape[2:]
        grid = [8 * size for size in coarse]  # finer than that of tokens: resized to it, neighbours have nothing in common
        numbers = torch.arange(1, math.prod(grid) + 1, device=features.device)
        # Whole numbers throughout, so that no device rounds otherwise.
        means = (2**20 * images.flatten(2).mean(2, dtype=torch.float64)).round().long()
        seed = (means * torch.arange(1, images.shape[1] + 1, device=means.device)).sum(1, keepdim=True) % _PRIME
        mixed = (48271 * seed + 69621 * numbers) % _PRIME
        for _ in range(3):
            mixed = (mixed * mixed + numbers + seed) % _PRIME
        return (mixed.double() / _PRIME).view(-1, *grid)


class _Function(nn.Module):
    """A function of features (B, K, *grid), or a module that computes one."""

    def __init__(self, function: Callable[[Tensor], Tensor], axis: int) -> None:
        super().__init__()
        self.function = function
        self.axis = axis

    def forward(self, features: Tensor, images: Tensor, trunk: nn.Module) -> Tensor:
        features = features.movedim(self.axis, 1)
        maps = self.function(features)
        if maps.shape != (features.shape[0], *features.shape[2:]):
            found = tuple(maps.shape)
            raise ProposalError(f"saliency must map features {tuple(features.shape)} to maps (B, *grid), not {found}")
        return maps.to(_wide(maps))


class _CAM(nn.Module):
    """Maps weighed as the classifier weighs them for its best class (Zhou et al., CVPR 2016), or for all by probability."""

    weights: Tensor

    def __init__(self, classifier: nn.Module, weights: Tensor, axis: int, *, expected: bool) -> None:
        super().__init__()
        self.classifier = classifier
        self.axis = axis
        self.expected = expected
        self.register_buffer("weights", weights, persistent=False)  # (classes, K)

    def forward(self, features: Tensor, images: Tensor, trunk: nn.Module) -> Tensor:
        logits = self.classifier(features)  # (B, classes)
        if self.expected:
            weights = logits.softmax(-1, dtype=_wide(logits)).to(self.weights.dtype) @ self.weights
        else:
            weights = self.weights[logits.argmax(-1)]
        return _weighed(features, weights, self.axis)


class _GradCAM(nn.Module):
    """Maps weighed by the gradient of the best class, averaged over positions (Selvaraju et al., ICCV 2017).

    Its last step, a ReLU, is left out: it would tie all positions that speak against the class.
    """

    def __init__(self, classifier: nn.Module, axis: int) -> None:
        super().__init__()
        self.classifier = classifier
        self.axis = axis

    def forward(self, features: Tensor, images: Tensor, trunk: nn.Module) -> Tensor:
        def best(values: Tensor) -> Tensor:
            return self.classifier(values).amax(-1).sum()

        slopes: Tensor = grad(best)(features)
        return _weighed(features, slopes.movedim(self.axis, 1).flatten(2).mean(-1), self.axis)


class _ScoreCAM(nn.Module):
    """Maps weighed by what the best class scores for the image masked by each, in a softmax (Wang et al., CVPR Workshops 2020).

    A forward pass for each of the K maps: for comparisons, not for speed. Its last ReLU is left out, as in Grad-CAM.
    """

    def __init__(self, classifier: nn.Module, axis: int) -> None:
        super().__init__()
        self.classifier = classifier
        self.axis = axis

    def forward(self, features: Tensor, images: Tensor, trunk: nn.Module) -> Tensor:
        maps = features.movedim(self.axis, 1)  # (B, K, *grid)
        flat = maps.flatten(2)
        flat = flat - flat.amin(-1, keepdim=True)
        flat = flat / flat.amax(-1, keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny)
        best = self.classifier(features).argmax(-1, keepdim=True)  # (B, 1)
        some = flat.view_as(maps).split(_MASKS, dim=1)
        scores = torch.cat([self._scores(images, masks, best, trunk) for masks in some], dim=1)
        return _weighed(features, scores.softmax(-1, dtype=_wide(scores)), self.axis)

    def _scores(self, images: Tensor, masks: Tensor, labels: Tensor, trunk: nn.Module) -> Tensor:
        """What classes (B, 1) score for images (B, C, *size) times each of their masks (B, m, *grid), (B, m)."""
        mode = "bilinear" if images.ndim == 4 else "trilinear"
        masks = F.interpolate(masks, size=images.shape[2:], mode=mode, align_corners=False)
        masked = (images.unsqueeze(1) * masks.unsqueeze(2)).flatten(0, 1)  # (B * m, C, *size)
        packed = torch.channels_last if images.ndim == 4 else torch.channels_last_3d
        logits = self.classifier(trunk(masked.contiguous(memory_format=packed)))
        return logits.unflatten(0, masks.shape[:2]).gather(2, labels.unsqueeze(1).expand(-1, masks.shape[1], 1)).squeeze(2)


def _class_weights(trunk: nn.Module, classifier: nn.Module, axis: int, sample: Tensor, name: str) -> Tensor:
    """The weights (classes, K) of a classifier that is one linear layer on averaged features; proved on numbers."""
    with torch.no_grad(), exact_float32():
        channels = trunk(sample).movedim(axis, 1).shape[1]
        layers = [m for m in classifier.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)]
        fitting = [m for m in layers if m.weight.flatten(1).shape[1] == channels]
        if len(layers) == 1 and fitting:
            weights, bias = layers[0].weight.detach().flatten(1), layers[0].bias
            random = torch.Generator().manual_seed(0)
            shape = trunk(sample).shape
            features = torch.randn((2, *shape[1:]), generator=random).to(sample.device, sample.dtype)
            pooled = features.movedim(axis, 1).flatten(2).mean(-1)
            if relative_error(classifier(features), F.linear(pooled, weights, bias)) < 1e-3:
                return weights
    raise ProposalError(
        f"saliency: class activation maps are for networks that average their features and apply one linear layer, and the "
        f'proposal ({name}) does more: pass saliency="gradcam", or "psm"'
    )
