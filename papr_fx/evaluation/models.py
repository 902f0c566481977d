"""Models and proposals that commands load by name: timm's, video models of transformers, and their checkpoints."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import load_checkpoint
from torch import nn

from ..errors import ArgumentError, PaprError, ProposalError
from ..proposals.named import LITE0, LITE0_STATISTICS, create_network, is_timm_name, lite0, near_names
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

_UNPACKED, _SMALL = 20, 100_000_000  # times, and bytes
_LONG = 500  # characters of a message


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
            f"hf-hub:OWNER/NAME or local-dir:FOLDER names one that timm saved{near_names(name)}"
        )
    if checkpoint and not Path(checkpoint).is_file():
        raise ArgumentError(f"there is no checkpoint {checkpoint}")
    source = f" from {checkpoint}" if checkpoint else "" if ":" in name else " from timm's hub"
    with _loading(f"the weights of {name!r} could not be loaded{source}"):
        _check_archives(checkpoint or _folder(name))
        model = timm.create_model(name, pretrained=pretrained, **options).eval()
        if checkpoint:
            load_checkpoint(model, checkpoint, weights_only=True)  # older versions of timm would run code in the file
        return model


def _folder(name: str) -> str:
    """The folder that a name of timm states; empty if it states none."""
    return name.removeprefix("local-dir:") if name.startswith("local-dir:") else ""


def _check_archives(place: str) -> None:
    """Refuses a file, or files in a folder, that would fill the memory: weights lie in zip files, hardly compressed."""
    if not place:
        return
    files = [*Path(place).iterdir()] if Path(place).is_dir() else [Path(place)]
    for file in files:
        if file.is_file() and zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > _UNPACKED * file.stat().st_size + _SMALL:
                raise ArgumentError(f"{file} has {file.stat().st_size} bytes and unpacks to {unpacked}: no weights do")


@contextmanager
def _loading(failed: str, kind: type[PaprError] = ArgumentError) -> Generator[None]:
    """Raises an error that says what failed, and why. A loader may raise anything for a file that is not what it reads."""
    try:
        yield
    except PaprError:
        raise
    except Exception as error:
        raise kind(f"{failed}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What an error says, without long lists of names."""
    if "weights_only" in str(error) and "global" in str(error):  # of torch, or of timm around it
        names = re.findall(r"(?:GLOBAL|globals:) ([\w.]+)", str(error))
        held = f" ({names[0]})" if names else ""
        return f"it holds more than tensors{held}, whose code is not run: save the state_dict of the model alone"
    said = f"{type(error).__name__} {error}"
    return said if len(said) <= _LONG else f"{said[:_LONG].rsplit(maxsplit=1)[0]} ..."


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
    given: dict[str, Any] = {"local_files_only": not pretrained, "trust_remote_code": False}  # else it asks the terminal
    with _loading(f"the video model {name!r} could not be loaded"):
        _check_archives(name)
        model = cast(nn.Module, transformers.AutoModelForVideoClassification.from_pretrained(name, **given)).eval()
    hint = f"save its image processor there too, such as transformers.VideoMAEImageProcessor().save_pretrained({name!r})"
    with _loading(f"{name!r} does not say how pixels are normalised ({hint})"):
        processor = transformers.AutoImageProcessor.from_pretrained(name, **given)
        mean, std = (tuple(float(value) for value in values) for values in (processor.image_mean, processor.image_std))
    return VideoModel(model, (mean, std))


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
    with _loading(f"the weights of {name!r} could not be loaded", ProposalError):
        network = image_model(name, pretrained=False, checkpoint=checkpoint) if checkpoint else None
        _check_archives(_folder(name))
        network = network or create_network(name, pretrained=pretrained).eval()
    own = statistics_of(network)
    return network, (statistics, own) if own else "shared"
