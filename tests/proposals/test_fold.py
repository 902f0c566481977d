"""Folding batch norms into convolutions."""

import pytest
import torch
from torch import nn

import papr_fx
from papr_fx.tracing.numerics import relative_error

from ..models import enliven
from .networks import built, livened, timm_model


def test_a_wrong_fold_is_caught(monkeypatch):
    network = timm_model("resnet18")
    monkeypatch.setattr(
        "papr_fx.proposals.fold._folded", lambda norm, kernel, bias: (nn.Parameter(kernel), nn.Parameter(norm.mean))
    )
    with pytest.raises(papr_fx.VerifyError, match="changed its output"):
        built(network)


def test_convolution_used_twice_is_not_folded():
    conv = nn.Conv2d(3, 3, 1)
    norm = nn.BatchNorm2d(3)
    network = livened(enliven(nn.Sequential(conv, norm, conv, nn.Tanh())))
    x = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        assert relative_error(built(network)(x), network(x).mean(1)) < 1e-5
