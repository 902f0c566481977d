"""3-D convolutions with flat kernels as 2-D convolutions and matrix products."""

import pytest
import torch
from torch import nn

from papr_fx.proposals.planar import PlanarConv3d, is_planar, replace_planar

FLAT = {
    "1x1x1": {"kernel_size": 1},
    "1x1x1 with bias and groups": {"kernel_size": 1, "groups": 2, "bias": True},
    "1x1x1 with stride": {"kernel_size": 1, "stride": (1, 2, 2)},
    "frames": {"kernel_size": (1, 3, 5), "stride": (1, 2, 1), "padding": (0, 1, 2)},
    "depthwise frames": {"kernel_size": (1, 3, 3), "groups": 6, "padding": (0, 1, 0), "dilation": (1, 1, 2)},
    "time": {"kernel_size": (3, 1, 1), "padding": (1, 0, 0), "bias": True},
    "time with stride": {"kernel_size": (5, 1, 1), "stride": (2, 1, 1), "padding": (2, 0, 0), "groups": 6},
}


@pytest.mark.parametrize("options", FLAT.values(), ids=FLAT.keys())
@torch.no_grad()
def test_flat_convolutions_of_clips(options):
    conv = nn.Conv3d(6, 12, **{"bias": False, **options})
    network = nn.Sequential(conv)
    x = torch.randn(2, 6, 7, 8, 9)
    expected = conv(x)
    replace_planar(network)
    assert type(network[0]) is PlanarConv3d
    for clips in (x, x.contiguous(memory_format=torch.channels_last_3d)):
        torch.testing.assert_close(network(clips), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": (1, 3, 3), "padding": (1, 1, 1)},
        {"kernel_size": (3, 1, 1), "padding": (0, 1, 0)},
        {"kernel_size": (1, 3, 3), "padding": (0, 1, 1), "padding_mode": "circular"},
        {"kernel_size": (1, 3, 3), "padding": "same"},
    ],
)
def test_convolutions_that_are_not_flat(options):
    assert not is_planar(nn.Conv3d(2, 2, **options))
