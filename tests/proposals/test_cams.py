"""Class activation maps: against torchcam, and against the networks' own classifiers."""

import importlib

import pytest
import timm
import torch

import papr_fx
from papr_fx.proposals.named import lite0
from papr_fx.tracing.numerics import relative_error

from ..models import enliven
from ..versions import HAS_TORCHCAM
from .networks import ConvNet, conv_net, maps_of


@pytest.fixture
def x():
    return torch.randn(3, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@HAS_TORCHCAM
@pytest.mark.parametrize(("name", "theirs"), [("cam", "CAM"), ("gradcam", "GradCAM"), ("scorecam", "ScoreCAM")])
def test_against_torchcam(name, theirs, x):
    method = getattr(importlib.import_module("torchcam.methods"), theirs)
    net = conv_net()
    found = maps_of(name, net, x)
    assert found.shape == (3, 8, 12)
    for image, own in zip(x, found, strict=True):
        layers = (net, "features.4", "fc") if name == "cam" else (net, "features.4")
        with method(*layers) as extractor:
            given = image.unsqueeze(0).requires_grad_()
            logits = net(given)
            (expected,) = extractor(int(logits.argmax()), logits, normalized=False)
        expected = expected.squeeze(0).detach()
        assert expected.max() > 0
        own = own if name == "cam" else own.clamp(min=0)  # torchcam clips the others
        assert relative_error(own / own.max(), expected / expected.max()) < 1e-6  # its gradients are sums, ours means


@torch.no_grad()
def test_expected_cam_weighs_by_probability(x):
    net = conv_net()
    probabilities = net(x).softmax(-1)
    expected = torch.stack(
        [
            sum(p * sum(net.fc.weight[c, k] * net.features(image[None])[0, k] for k in range(16)) for c, p in enumerate(row))
            for image, row in zip(x, probabilities, strict=True)
        ]
    )
    assert relative_error(maps_of("expected-cam", net, x), expected) < 1e-9
    assert relative_error(maps_of("cam", net, x), expected) > 1e-2


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["resnet10t", "mobileone_s0", "lcnet_035", "efficientnet_lite0", "mobilenetv3_small_050"])
def test_networks(name):
    net = timm.create_model(name, num_classes=7).eval()
    x = torch.randn(2, 3, 96, 96)
    linear = name in ("resnet10t", "mobileone_s0", "efficientnet_lite0")
    for saliency in ("expected-cam", "gradcam"):
        if linear or saliency == "gradcam":
            assert maps_of(saliency, net, x).shape[0] == 2
        else:
            with pytest.raises(papr_fx.ProposalError, match="average their features and apply one linear layer"):
                maps_of(saliency, net, x)


def test_cam_and_gradcam_agree_on_linear_classifiers(x):
    """The gradient of pooled features is the class weight over the number of positions."""
    net = conv_net()
    assert relative_error(maps_of("gradcam", net, x) * 8 * 12, maps_of("cam", net, x)) < 1e-9


class ReadsItsBatch(ConvNet):
    def forward(self, x):
        batch = x.shape[0]
        return self.fc(self.pool(self.features(x)).view(batch, -1))


def test_a_classifier_that_reads_the_batch_from_the_images(x):
    net = enliven(ReadsItsBatch()).double().eval()
    assert relative_error(maps_of("expected-cam", net, x), maps_of("expected-cam", conv_net(), x)) < 1e-9
    assert maps_of("cam", lite0(), torch.randn(2, 3, 64, 64)).shape == (2, 2, 2)
