"""Clips and clip models that are refused."""

import pytest
import torch
from torch import nn
from torchvision.models.video import r3d_18

import papr_fx

from ..models import Shape, ToyViT
from ..models.clips import ClipViT, PatchMajor, clip_proposal, huggingface

REFUSED = {
    "frames as many as channels": (
        lambda: papr_fx.transform(ClipViT((2, 3, 4), 0), clip_proposal(), 0.5, example_input=torch.zeros(1, 3, 3, 12, 12)),
        papr_fx.ArgumentError,
        "do not tell frames from the 3 channels",
    ),
    "grey clips": (
        lambda: papr_fx.transform(ClipViT((2, 3, 4), 0), clip_proposal(), 0.5, example_input=torch.zeros(1, 1, 4, 12, 12)),
        papr_fx.ArgumentError,
        "do not tell frames from the 3 channels",
    ),
    "no size": (
        lambda: papr_fx.transform(ClipViT((2, 3, 4), 0), clip_proposal(), 0.5),
        papr_fx.ArgumentError,
        r"torch.zeros\(1, 3, 16, 224, 224\)",
    ),
    "other frames": (
        lambda: papr_fx.transform(ClipViT((2, 3, 4), 0), clip_proposal(), 0.5, example_input=torch.zeros(1, 3, 8, 12, 12)),
        papr_fx.TraceError,
        r"ClipViT itself does not run on images \(1, 3, 8, 12, 12\): RuntimeError: The size of tensor",
    ),
    "a clip proposal of an image model": (
        lambda: papr_fx.transform(ToyViT(Shape()), r3d_18(), 0.5),
        papr_fx.ProposalError,
        "takes clips, but the model takes images",
    ),
    "frames in the size of an image": (
        lambda: papr_fx.transform(nn.Conv2d(3, 4, 2), "x", 0.5, example_input=torch.zeros(1, 3, 8, 8), proposal_size=(1, 2, 3)),
        papr_fx.ArgumentError,
        r"proposal_size must be a shorter side in pixels, or \(rows, columns\), each",
    ),
    "divided attention": (
        lambda: papr_fx.transform(huggingface("TimesformerForVideoClassification"), clip_proposal(), 0.5),
        papr_fx.NoSiteError,
        r"flattens a grid of positions \(t, h, w\) of the clips",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    call, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        call()


def test_frames_side_by_side_are_refused():
    with pytest.raises(papr_fx.PaprError):
        papr_fx.transform(PatchMajor(0, at_once=False), clip_proposal(), 0.5, example_input=torch.zeros(1, 3, 4, 12, 6))


def test_questions_about_clips_of_another_length_are_refused():
    gm = papr_fx.transform(huggingface("VivitForVideoClassification"), clip_proposal(), 0.5, verify=False)
    for shape in ((1, 4, 3, 48, 48), (1, 3, 6, 48, 48), (1, 6, 3, 64, 64), (1, 3, 48, 48)):
        with pytest.raises(papr_fx.ArgumentError, match="images must be a tensor"):
            papr_fx.keep_masks(gm, torch.zeros(shape, dtype=torch.float64))
