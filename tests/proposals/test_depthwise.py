"""Depthwise convolutions as sums of shifted images."""

import copy

import pytest
import torch
from torch import nn

from papr_fx.proposals.depthwise import DepthwiseConv2d, add_shifted, replace_depthwise


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (3, 2, 0), ((1, 3), (1, 2), (0, 2)), (2, 1, 1)]
)
def test_depthwise_convolutions_equal_sums_of_shifted_images(kernel, stride, padding, bias):
    conv = nn.Conv2d(5, 5, kernel, stride, padding, groups=5, bias=bias).double()
    x = torch.randn(2, 5, 7, 10, dtype=torch.float64)
    network = nn.Sequential(conv)
    expected = network(x)
    replace_depthwise(network)
    assert type(network[0]) is DepthwiseConv2d
    for result in (network(x), copy.deepcopy(network)(x), add_shifted(network[0], x)):
        assert torch.allclose(result, expected, atol=1e-12, rtol=0)


def test_other_convolutions_stay_as_they_are():
    convolutions = [
        nn.Conv2d(4, 4, 5, groups=4),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 8, 3, groups=4),
        nn.Conv2d(4, 4, 3, groups=4, dilation=2),
        nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, groups=4, padding="same"),
    ]
    network = nn.Sequential(*convolutions)
    replace_depthwise(network)
    assert list(network) == convolutions
