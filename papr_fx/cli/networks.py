"""The networks that `--model`, `--proposal` and related options name."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import nn

from ..evaluation import variants
from ..evaluation.decoders import Views
from ..evaluation.models import image_model, proposal_for
from ..evaluation.subject import ModelSpec, Subject, named_subject
from ..evaluation.variants import ProposalSpec
from ..proposals.named import LITE0
from ..proposals.saliency import needs_proposal
from ..proposals.statistics import InputStats

UNLEARNT = "note: the proposal has random weights: --pretrained or --proposal lite0 give it a map to judge"


def model_of(arguments: argparse.Namespace) -> nn.Module:
    """The timm model of a command that reads no data set."""
    return image_model(arguments.model, pretrained=arguments.pretrained, checkpoint=arguments.checkpoint)


def image_proposal(arguments: argparse.Namespace, model: nn.Module) -> tuple[nn.Module, InputStats]:
    """The proposal for a timm model, and how the images of both are normalised."""
    config = resolve_model_data_config(model)
    return proposal_for((config["mean"], config["std"]), arguments.proposal, pretrained=arguments.pretrained)


def subject_of(arguments: argparse.Namespace, device: torch.device) -> Subject:
    """The model of `eval` and `tune`."""
    spec = ModelSpec(
        arguments.model,
        device,
        pretrained=arguments.pretrained,
        checkpoint=arguments.checkpoint,
        preprocessing={name: vars(arguments)[name] for name in ("img_size", "crop_pct", "interpolation")},
        channels_last=arguments.channels_last,
        options=arguments.model_kwargs,
        classes=arguments.num_classes,
        views=views_of(arguments),
    )
    return named_subject(spec)


def proposal_of(arguments: argparse.Namespace, subject: Subject) -> tuple[nn.Module | None, dict[str, Any]]:
    """The proposal of `eval` and `tune`, and the options of `transform` that go with it."""
    spec = ProposalSpec(
        arguments.proposal,
        pretrained=arguments.pretrained,
        checkpoint=arguments.proposal_checkpoint,
        size=arguments.proposal_size,
        shared=arguments.shared_stats,
        saliency=arguments.saliency,
    )
    proposal, options = variants.proposal_of(subject, spec)
    return proposal, {**options, "background": arguments.background}


def views_of(arguments: argparse.Namespace) -> Views:
    """The views of a video."""
    return Views(arguments.temporal_views, arguments.spatial_views, arguments.frame_step)


def has_learnt(arguments: argparse.Namespace, proposal: str) -> bool:
    """Whether the proposal has weights that were trained; what needs no proposal needs none."""
    needed = needs_proposal(getattr(arguments, "saliency", "psm"))
    return not needed or bool(arguments.pretrained or arguments.proposal_checkpoint or proposal == LITE0)


def described(arguments: argparse.Namespace, subject: Subject, model: str, proposal: str) -> str:
    """The names of both networks, and which of them have random weights."""
    words = [model + ("" if subject.loaded else " (random weights; --pretrained loads real ones)")]
    if not needs_proposal(getattr(arguments, "saliency", "psm")):
        return f"{words[0]}, no proposal: {arguments.saliency}"
    background = getattr(arguments, "background", "auto")
    words.append(f"proposal {proposal}" + ("" if has_learnt(arguments, proposal) else " (random weights)"))
    words += [f"background {background}"] if background != "auto" else []
    return ", ".join(words)
