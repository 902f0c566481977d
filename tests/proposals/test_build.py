"""Significance networks: the cut, the fused weights, normalisation, and what is refused."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import papr_fx
from papr_fx.proposals.build import SignificanceNet, build_proposal
from papr_fx.proposals.depthwise import DepthwiseConv2d, add_shifted, replace_depthwise
from papr_fx.proposals.named import lite0
from papr_fx.proposals.planar import PlanarConv3d, is_planar, replace_planar
from papr_fx.tracing.numerics import relative_error

from ..models import Shape, ToyViT, enliven, toy_proposal


def built(proposal: object, shape: tuple[int, ...] = (1, 3, 96, 128), **options) -> SignificanceNet:
    options = {"size": None, "input_stats": "auto", "verify": True, **options}
    return build_proposal(proposal, nn.Identity(), torch.zeros(shape), **options)


def livened(network: nn.Module) -> nn.Module:
    """Batch norms with statistics and scales that a wrong fold would get wrong."""
    generator = torch.Generator().manual_seed(3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in (
                (module.running_mean, -0.5),
                (module.running_var, 0.5),
                (module.weight, 0.5),
                (module.bias, -0.5),
            ):
                tensor.data = torch.rand(tensor.shape, generator=generator) + low
    return network.eval()


def before_pooling(network: nn.Module, pool: str) -> Callable[[Tensor], Tensor]:
    """The input of the module that pools, caught by a hook: what the cut must give."""

    def features(x: Tensor) -> Tensor:
        caught: list[Tensor] = []
        handle = network.get_submodule(pool).register_forward_pre_hook(lambda _m, inputs: caught.append(inputs[0]))
        network(x)
        handle.remove()
        return caught[0]

    return features


def timm_model(name: str) -> nn.Module:
    return livened(timm.create_model(name))


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


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_map_is_the_mean_of_the_features_before_pooling(name):
    make, pool = CLASSIFIERS[name]
    network = make(name.split(" ")[0])
    kept = {key: value.clone() for key, value in network.state_dict().items()}
    net = built(network)
    x = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        features = before_pooling(network, pool)(x) if pool != "function" else network.features(x)
        assert relative_error(net(x), features.mean(1)) < 1e-4
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in kept.items())
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
    dense = [conv for conv in merged if type(conv) is nn.Conv2d]
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in dense)
    assert len(merged) - len(dense) == 21  # depthwise, laid out tap by tap


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


def test_frozen_for_ever():
    gm = papr_fx.transform(ToyViT(Shape()), toy_proposal(), 0.5)
    gm.train()
    assert gm.training
    assert not any(module.training for module in gm.papr_proposal.modules())
    loss = gm(torch.randn(2, 3, 8, 12)).sum()
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in gm.papr_proposal.parameters())
    assert all(p.grad is not None for name, p in gm.named_parameters() if not name.startswith(("papr_proposal", "query")))


def test_renormalises_between_the_two_networks():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64)  # mean and std 0.5
    network = timm_model("resnet18")  # ImageNet's
    pixels = torch.rand(2, 3, 64, 64)
    config = network.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = before_pooling(network, "global_pool")((pixels - mean) / std).mean(1)
        own = (pixels - 0.5) / 0.5
        auto = build_proposal(network, model, pixels, size=None, input_stats="auto", verify=False)
        assert relative_error(auto(own), expected) < 1e-4
        given = (((0.5,) * 3, (0.5,) * 3), (config["mean"], config["std"]))
        said = build_proposal(network, nn.Identity(), pixels, size=None, input_stats=given, verify=False)
        assert relative_error(said(own), expected) < 1e-4
        shared = build_proposal(network, model, pixels, size=None, input_stats="shared", verify=False)
        assert relative_error(shared(own), before_pooling(network, "global_pool")(own).mean(1)) < 1e-4


@pytest.mark.parametrize(("size", "resized"), [(64, (64, 85)), ((48, 40), (48, 40))])
def test_proposal_size(size, resized):
    network = timm_model("resnet18")
    x = torch.randn(2, 3, 96, 128)
    small = F.interpolate(x, size=resized, mode="bilinear", align_corners=False)
    with torch.no_grad():
        assert relative_error(built(network, size=size)(x), before_pooling(network, "global_pool")(small).mean(1)) < 1e-4


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


REFUSED = {
    "none": (lambda: None, "not NoneType"),
    "unknown name": (lambda: "resnet_of_my_own", "know no network named 'resnet_of_my_own'"),
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


def test_a_wrong_fold_is_caught(monkeypatch):
    network = timm_model("resnet18")
    monkeypatch.setattr(
        "papr_fx.proposals.fold._folded", lambda norm, kernel, bias: (nn.Parameter(kernel), nn.Parameter(norm.mean))
    )
    with pytest.raises(papr_fx.VerifyError, match="changed its output"):
        built(network)


def test_precision_follows_the_model():
    model = ToyViT(Shape()).bfloat16()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    assert {p.dtype for p in gm.papr_proposal.parameters()} == {torch.bfloat16}
    assert gm(torch.randn(2, 3, 8, 12).bfloat16()).dtype == torch.bfloat16
    half = papr_fx.transform(ToyViT(Shape()), copy.deepcopy(toy_proposal()).half(), 0.5)
    assert {p.dtype for p in half.papr_proposal.parameters()} == {torch.float32}


def test_convolution_used_twice_is_not_folded():
    conv = nn.Conv2d(3, 3, 1)
    norm = nn.BatchNorm2d(3)
    network = livened(enliven(nn.Sequential(conv, norm, conv, nn.Tanh())))
    x = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        assert relative_error(built(network)(x), network(x).mean(1)) < 1e-5


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
