"""Models and proposals that commands load by name: timm's, video models of transformers, and their checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import load_checkpoint
from torch import nn

from ..errors import ArgumentError, ProposalError
from ..proposals.named import LITE0, LITE0_STATISTICS, create_network, is_timm_name, lite0
from ..proposals.statistics import InputStats, Statistics, statistics_of

VIDEO_MODELS = {
    "videomae_base": {},
    "videomae_large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}

_TRANSFORMERS_ERRORS = (OSError, ValueError, KeyError)


@dataclass(frozen=True)
class VideoModel:
    """A classifier of clips (B, T, C, H, W), and the mean and std of their pixels."""

    model: nn.Module
    statistics: Statistics


def image_model(name: str, *, pretrained: bool, checkpoint: str = "", **options: Any) -> nn.Module:
    """Loads a timm model in eval mode.

    Args:
        name: Its name in timm's registry, or `hf-hub:` or `local-dir:` and where a model that timm saved lies.
        pretrained: Whether to load its published or saved weights.
        checkpoint: A local file of weights to load instead.
        **options: Further options of `timm.create_model`.

    Raises:
        ArgumentError: timm knows no such model, or its weights cannot be loaded.
    """
    if not is_timm_name(name):
        raise ArgumentError(
            f"timm knows no model named {name!r}; `python -c 'import timm; print(timm.list_models())'` lists them, and "
            "hf-hub:OWNER/NAME or local-dir:FOLDER names one that timm saved"
        )
    if checkpoint and not Path(checkpoint).is_file():
        raise ArgumentError(f"there is no checkpoint {checkpoint}")
    try:
        model = timm.create_model(name, pretrained=pretrained, **options).eval()
        if checkpoint:
            load_checkpoint(model, checkpoint, weights_only=True)  # older versions of timm would run code in the file
        return model
    except Exception as error:  # a loader may raise anything for a file that is no checkpoint of this model
        source = f" from {checkpoint}" if checkpoint else "" if ":" in name else " from timm's hub"
        raise ArgumentError(f"the weights of {name!r} could not be loaded{source}: {type(error).__name__} {error}") from error


def video_model(name: str, *, pretrained: bool) -> VideoModel:
    """Loads a video classifier of transformers in eval mode: one of `VIDEO_MODELS` with random weights, or a saved one.

    Args:
        name: One of `VIDEO_MODELS`; a folder that `save_pretrained` of a model and its image processor wrote; or, with
            `pretrained`, a name on transformers' hub.
        pretrained: Whether to ask the hub.

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
    except _TRANSFORMERS_ERRORS as error:
        raise ArgumentError(f"the video model {name!r} could not be loaded: {type(error).__name__} {error}") from error
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name, local_files_only=not pretrained)
    except _TRANSFORMERS_ERRORS as error:
        raise ArgumentError(
            f"{name!r} does not say how pixels are normalised ({type(error).__name__}): save its image processor there too, "
            f"such as transformers.VideoMAEImageProcessor().save_pretrained({name!r})"
        ) from error
    return VideoModel(cast(nn.Module, model).eval(), (tuple(processor.image_mean), tuple(processor.image_std)))


def proposal_for(statistics: Statistics, name: str, *, pretrained: bool, checkpoint: str = "") -> tuple[nn.Module, InputStats]:
    """Loads a proposal network by name.

    Args:
        statistics: Mean and std of the pixels that the model takes.
        name: "lite0", or what `create_network` knows.
        pretrained: Whether to load the network's published weights.
        checkpoint: A file with its weights; the network is then one of timm's.

    Returns:
        The network in eval mode, and the `input_stats` to pass to `transform`.

    Raises:
        ProposalError: No installed library knows the name, or its weights cannot be loaded.
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
