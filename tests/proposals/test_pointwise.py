"""Convolutions of one pixel as matrix products."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.profiler import profile

from papr_fx.proposals.build import ImageSpec, ProposalOptions, build_proposal
from papr_fx.proposals.pointwise import PointwiseConv2d, replace_pointwise


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding", [0, "same", "valid"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equal_the_convolution(bias, padding, layout):
    conv = nn.Conv2d(5, 7, 1, padding=padding, bias=bias).double()
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64).contiguous(memory_format=layout)
    network = nn.Sequential(conv)
    expected = network(x)
    replace_pointwise(network)
    assert type(network[0]) is PointwiseConv2d
    for result in (network(x), copy.deepcopy(network)(x)):
        assert torch.allclose(result, expected, atol=1e-12, rtol=0)
        assert result.is_contiguous(memory_format=torch.channels_last)


def test_other_convolutions_stay_as_they_are():
    convolutions = [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, (1, 2)),
        nn.Conv2d(4, 4, 1, stride=2),
        nn.Conv2d(4, 4, 1, padding=1),
        nn.Conv2d(4, 4, 1, groups=2),
    ]
    network = nn.Sequential(*convolutions)
    replace_pointwise(network)
    assert list(network) == convolutions


def test_each_is_one_product_in_a_proposal():
    proposal, model = timm.create_model("mobileone_s0").eval(), nn.Conv2d(3, 4, 3)
    images = torch.randn(2, 3, 64, 64)
    network = build_proposal(proposal, model, ImageSpec.of(images), ProposalOptions(verify=False))
    found = [module for module in network.modules() if isinstance(module, PointwiseConv2d)]
    assert len(found) == 21
    with profile() as profiled:
        network(images)
    calls = {event.key: event.count for event in profiled.key_averages()}
    assert calls["aten::addmm"] == 21
