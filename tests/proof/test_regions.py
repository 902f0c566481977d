"""Regions: pixel operators that mix positions."""

import pytest
import torch
from torch import nn

import papr_fx
from papr_fx.dataflow.positionwise import PositionwiseProbe, Verdict
from papr_fx.proof import regions

from ..models import enliven, toy_proposal
from .parts import case_of, failures


class NormOverSpace(nn.Module):
    """The branch of a PoolFormer's MLP: its norm is over channels and positions."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(first, nn.Conv2d(8, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1))

    def forward(self, x):
        return x + self.branch(x)


class ByLargest(nn.Module):
    """Scales all positions by the largest value that any of them has in a channel."""

    def __init__(self, channel: int) -> None:
        super().__init__()
        self.channel = channel

    def forward(self, x):
        return x * x[:, self.channel].amax((1, 2)).sigmoid()[:, None, None, None]


def mixing(first: nn.Module) -> nn.Module:
    layers = (nn.Conv2d(3, 8, 4, 4), NormOverSpace(first), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return enliven(nn.Sequential(*layers)).eval()


@pytest.fixture
def _trusting(monkeypatch):
    """The pass takes every operation for one that treats positions independently."""

    def verdict(_self, node, layouts):
        layout = layouts[node.all_input_nodes[0]]
        return Verdict(layout if layout == "BCHW" else "")

    monkeypatch.setattr(PositionwiseProbe, "verdict", verdict)


@pytest.mark.usefixtures("_trusting")
def test_only_regions_find_a_norm_over_space():
    found = failures(case_of(mixing(nn.GroupNorm(1, 8)), example_input=torch.zeros(1, 3, 32, 48), mode="pixels"))
    assert list(found) == ["regions"]
    assert "an operator mixes positions" in found["regions"]


@pytest.mark.usefixtures("_trusting")
def test_a_norm_over_space_is_caught():
    with pytest.raises(papr_fx.VerifyError, match="regions: with fewer positions"):
        papr_fx.transform(
            mixing(nn.GroupNorm(1, 8)), toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 32, 48), mode="pixels"
        )


@pytest.mark.usefixtures("_trusting")
@pytest.mark.parametrize("channel", range(4))
def test_one_position_that_scales_all_is_seen(channel):
    with pytest.raises(papr_fx.VerifyError, match="regions: with fewer positions"):
        regions.check(case_of(mixing(ByLargest(channel)), example_input=torch.zeros(1, 3, 16, 24), mode="pixels"))
