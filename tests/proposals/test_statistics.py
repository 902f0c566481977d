"""Normalisation statistics: images are normalised again for the proposal."""

import pytest
import timm
import torch
from torch import nn

import papr_fx
from papr_fx.proposals.build import ImageSpec, ProposalOptions, build_proposal
from papr_fx.tracing.numerics import relative_error

from ..models import Shape, ToyViT
from .networks import before_pooling, timm_model


def test_renormalises_between_the_two_networks():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64)  # mean and std 0.5
    network = timm_model("resnet18")  # ImageNet's
    pixels = torch.rand(2, 3, 64, 64)
    config = network.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))

    def error(target, input_stats, expected):
        options = ProposalOptions(input_stats=input_stats, verify=False)
        return relative_error(build_proposal(network, target, ImageSpec.of(pixels), options)(own), expected)

    with torch.no_grad():
        own = (pixels - 0.5) / 0.5
        expected = before_pooling(network, "global_pool")((pixels - mean) / std).mean(1)
        assert error(model, "auto", expected) < 1e-4
        given = (((0.5,) * 3, (0.5,) * 3), (config["mean"], config["std"]))
        assert error(nn.Identity(), given, expected) < 1e-4
        assert error(model, "shared", before_pooling(network, "global_pool")(own).mean(1)) < 1e-4


@pytest.mark.parametrize("given", [None, "none", 3])
def test_other_forms_are_refused(given):
    with pytest.raises(papr_fx.ArgumentError, match='input_stats must be "auto", "shared"'):
        papr_fx.transform(ToyViT(Shape()), timm.create_model("resnet10t"), 0.5, input_stats=given)
