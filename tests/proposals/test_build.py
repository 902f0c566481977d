"""Significance networks of classifiers and other modules: the cut, the fused weights, and what is refused."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import papr_fx
from papr_fx.proposals.depthwise import DepthwiseConv2d
from papr_fx.proposals.named import lite0
from papr_fx.proposals.pointwise import PointwiseConv2d
from papr_fx.tracing.numerics import relative_error

from .networks import before_pooling, built, livened, timm_model


def torchvision_model(name: str) -> nn.Module:
    return livened(getattr(torchvision.models, name)(weights=None))


CLASSIFIERS = {
    "mobileone_s0": (timm_model, "head"),
    "resnet18": (timm_model, "global_pool"),
    "resnet50": (timm_model, "global_pool"),
    "resnet101": (timm_model, "global_pool"),
    "resnet152": (timm_model, "global_pool"),
    "mobilenetv2_100": (timm_model, "global_pool"),
    "mobilenetv3_small_100": (timm_model, "global_pool"),
    "efficientnet_b0": (timm_model, "global_pool"),
    "regnety_002": (timm_model, "head"),
    "convnext_tiny": (timm_model, "head"),
    "resnet18 (torchvision)": (torchvision_model, "avgpool"),
    "resnet50 (torchvision)": (torchvision_model, "avgpool"),
    "resnet101 (torchvision)": (torchvision_model, "avgpool"),
    "resnet152 (torchvision)": (torchvision_model, "avgpool"),
    "mobilenet_v2 (torchvision)": (torchvision_model, "function"),
    "mobilenet_v3_small (torchvision)": (torchvision_model, "avgpool"),
    "efficientnet_b0 (torchvision)": (torchvision_model, "avgpool"),
    "regnet_y_400mf (torchvision)": (torchvision_model, "avgpool"),
    "convnext_tiny (torchvision)": (torchvision_model, "avgpool"),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "101" in name or "152" in name else ()) for name in CLASSIFIERS]
)
def test_map_is_the_mean_of_the_features_before_pooling(name):
    make, pool = CLASSIFIERS[name]
    network = make(name.split(" ")[0])
    kept = {key: value.clone() for key, value in network.state_dict().items()}
    net = built(network)
    x = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        features = before_pooling(network, pool)(x) if pool != "function" else network.features(x)
        assert relative_error(net(x), features.mean(1)) < 1e-4
    after = network.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in kept.items())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert not [n for n in net.trunk.graph.nodes if n.target is F.batch_norm]


def test_a_kernel_over_the_whole_map_is_a_pooling():
    network = timm_model("vgg11")
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert relative_error(built(network, (1, 3, 224, 224))(x), network.features(x).mean(1)) < 1e-4


def test_real_weights_of_lite0():
    network = lite0()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert relative_error(built(network, (1, 3, 224, 224))(x), network.extract_features(x).mean(1)) < 1e-4


def test_mobileone_is_merged_into_single_branches_and_channels_last():
    source = timm.create_model("mobileone_s0")
    net = built(source)
    branches = [m for m in source.modules() if isinstance(m, nn.Conv2d)]
    merged = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(merged) < len(branches) / 2
    dense = [conv for conv in merged if not isinstance(conv, DepthwiseConv2d)]  # those are laid out tap by tap
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in dense)
    assert len(merged) - len(dense) == 21
    assert sum(isinstance(conv, PointwiseConv2d) for conv in dense) == 21


class OwnMap(nn.Module):
    """A user's map, (B, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.std(dim=1)


class Untraceable(nn.Module):
    """A map that no tracer can record, as it branches on what the image holds."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1) if float(x.shape[0]) > 0 and bool(torch.ones(()) > 0) else x.amax(1)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torchvision.models.resnet18()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - 0.5)


def test_other_kinds_of_proposal():
    x = torch.randn(2, 3, 96, 128)
    headless = nn.Sequential(nn.Conv2d(3, 5, 3, 2), nn.ReLU(), nn.Conv2d(5, 6, 3))
    with torch.no_grad():
        assert relative_error(built(headless)(x), headless(x).mean(1)) < 1e-5
        assert torch.equal(built(OwnMap())(x), x.std(dim=1))
        assert torch.equal(built(Untraceable())(x), x.mean(1))
        wrapped = Wrapped().eval()
        assert relative_error(built(wrapped)(x), before_pooling(wrapped, "net.avgpool")(x).mean(1)) < 1e-4


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


REFUSED = {
    "none": (lambda: None, "not NoneType"),
    "unknown name": (lambda: "resnet_of_my_own", "know no network named 'resnet_of_my_own'"),
    "misspelt name": (lambda: "mobilone_s0", "no network named 'mobilone_s0'; near: mobileone_s0"),
    "tuple": (Pair, "returns a tuple, not one tensor"),
    "no map": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 96 * 128, 4)), "no spatial map"),
    "channels": (lambda: nn.Conv2d(1, 4, 3), r"refused images \(2, 3, 96, 128\).*1 channels"),
    "vit": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=(96, 128)), "a patch embedding is no significance map"),
    "swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=(96, 128)), "no significance map"),
    "meta": (lambda: timm.create_model("resnet18").to("meta"), "no weights"),
    "compiled": (lambda: torch.compile(nn.Conv2d(3, 4, 3)), "OptimizedModule"),
    "scripted": (lambda: torch.jit.ScriptModule(), "ScriptModule"),
    "pooled": (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1)), "no spatial map"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    make, message = REFUSED[case]
    with pytest.raises(papr_fx.ProposalError, match=message):
        built(make())


class Failing(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize("error", [ZeroDivisionError("a"), OSError("b"), NameError("c"), KeyError("d"), RuntimeError("e")])
def test_whatever_a_proposal_raises_is_a_refusal(error):
    with pytest.raises(papr_fx.ProposalError, match="refused images"):
        built(Failing(error))
