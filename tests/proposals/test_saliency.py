"""Sources of the map other than the mean: against torchcam, and against the networks' own classifiers."""

import copy

import pytest
import timm
import torch
from torch import nn
from torchcam.methods import CAM, GradCAM, ScoreCAM

import papr_fx
from papr_fx.proposals.build import build_proposal
from papr_fx.proposals.named import lite0
from papr_fx.proposals.saliency import NAMES
from papr_fx.tracing.numerics import relative_error

from ..models import Shape, ToyViT, enliven, toy_proposal


class ConvNet(nn.Module):
    """A classifier of the kind that class activation maps are made for."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 16, 3, padding=1), nn.GELU()
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, classes)

    def forward(self, x):
        return self.fc(self.pool(self.features(x)).flatten(1))


def network() -> ConvNet:
    return enliven(ConvNet()).double().eval()


def maps(saliency, source, x):
    net = build_proposal(source, nn.Identity(), x, size=None, input_stats="shared", saliency=saliency, verify=True)
    return net(x)


@pytest.fixture
def x():
    return torch.randn(3, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("name", "method"), [("cam", CAM), ("gradcam", GradCAM), ("scorecam", ScoreCAM)])
def test_against_torchcam(name, method, x):
    net = network()
    found = maps(name, net, x)
    assert found.shape == (3, 8, 12)
    for image, own in zip(x, found, strict=True):
        layers = (net, "features.4", "fc") if method is CAM else (net, "features.4")
        with method(*layers) as extractor:
            given = image.unsqueeze(0).requires_grad_()
            logits = net(given)
            (expected,) = extractor(int(logits.argmax()), logits, normalized=False)
        expected = expected.squeeze(0).detach()
        assert expected.max() > 0
        own = own if method is CAM else own.clamp(min=0)  # torchcam clips the others
        assert relative_error(own / own.max(), expected / expected.max()) < 1e-6  # its gradients are sums, ours means


@torch.no_grad()
def test_expected_cam_weighs_by_probability(x):
    net = network()
    probabilities = net(x).softmax(-1)
    expected = torch.stack(
        [
            sum(p * sum(net.fc.weight[c, k] * net.features(image[None])[0, k] for k in range(16)) for c, p in enumerate(row))
            for image, row in zip(x, probabilities, strict=True)
        ]
    )
    assert relative_error(maps("expected-cam", net, x), expected) < 1e-9
    assert relative_error(maps("cam", net, x), expected) > 1e-2


def test_psm_stays_the_mean(x):
    net = network()
    assert relative_error(maps("psm", net, x), net.features(x).mean(1)) < 1e-12


@torch.no_grad()
def test_random_scores_follow_the_image_alone(x):
    net = network()
    found = maps("random", net, x)
    assert torch.equal(found, maps("random", net, x))
    assert torch.equal(found[1:], maps("random", net, x[1:]))
    assert len(found.unique()) == found.numel()
    assert abs(float(found.mean()) - 0.5) < 0.1
    near = papr_fx.ops.resize_map(found, (14, 14))
    pairs = torch.stack([near[:, :, 1:].flatten(), near[:, :, :-1].flatten()])
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.1


@pytest.mark.parametrize("make", [lambda: lambda f: f.amax(1), lambda: nn.Sequential(nn.Conv2d(16, 1, 1), nn.Flatten(1, 2))])
@torch.no_grad()
def test_a_function_or_module_of_features(make, x):
    net, function = network(), make()
    if isinstance(function, nn.Module):
        function = function.double()
    assert relative_error(maps(function, net, x), function(net.features(x))) < 1e-12
    with pytest.raises(papr_fx.ProposalError, match="saliency must map features"):
        maps(lambda f: f.mean(), net, x)


@pytest.mark.parametrize("name", ["resnet10t", "mobileone_s0", "lcnet_035", "efficientnet_lite0", "mobilenetv3_small_050"])
def test_networks(name):
    net = timm.create_model(name, num_classes=7).eval()
    x = torch.randn(2, 3, 96, 96)
    linear = name in ("resnet10t", "mobileone_s0", "efficientnet_lite0")
    for saliency in ("expected-cam", "gradcam"):
        if linear or saliency == "gradcam":
            assert maps(saliency, net, x).shape[0] == 2
        else:
            with pytest.raises(papr_fx.ProposalError, match="average their features and apply one linear layer"):
                maps(saliency, net, x)


def test_cam_and_gradcam_agree_on_linear_classifiers(x):
    """The gradient of pooled features is the class weight over the number of positions."""
    net = network()
    assert relative_error(maps("gradcam", net, x) * 8 * 12, maps("cam", net, x)) < 1e-9


class ReadsItsBatch(ConvNet):
    def forward(self, x):
        batch = x.shape[0]
        return self.fc(self.pool(self.features(x)).view(batch, -1))


def test_a_classifier_that_reads_the_batch_from_the_images(x):
    net = enliven(ReadsItsBatch()).double().eval()
    assert relative_error(maps("expected-cam", net, x), maps("expected-cam", network(), x)) < 1e-9
    assert maps("cam", lite0(), torch.randn(2, 3, 64, 64)).shape == (2, 2, 2)


@pytest.mark.parametrize("saliency", ["mean", None, nn.Linear, 3])
def test_arguments(saliency):
    with pytest.raises(papr_fx.ArgumentError, match='saliency must be one of "psm"'):
        papr_fx.transform(ToyViT(Shape()), toy_proposal(), 0.5, saliency=saliency)


@pytest.mark.parametrize("saliency", ["cam", "expected-cam", "gradcam", "scorecam"])
def test_a_proposal_without_classes_is_refused(saliency):
    with pytest.raises(papr_fx.ProposalError, match="asks the classes of the proposal"):
        papr_fx.transform(ToyViT(Shape()), toy_proposal(), 0.5, saliency=saliency)
    flat = nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), nn.Flatten(1, 2))
    with pytest.raises(papr_fx.ProposalError, match="returns one map"):
        papr_fx.transform(ToyViT(Shape()), flat, 0.5, saliency=saliency)


@pytest.mark.parametrize("saliency", NAMES)
@torch.no_grad()
def test_in_a_transformed_model(saliency):
    """Compiled in one graph, in autocast, copied, and the tokens kept are those of the map's best."""
    model = ToyViT(Shape(image=(16, 24))).eval()
    gm = papr_fx.transform(model, enliven(ConvNet()), 0.5, saliency=saliency)
    x = torch.randn(2, 3, 16, 24)
    torch.compiler.reset()
    assert relative_error(torch.compile(gm, fullgraph=True)(x), gm(x)) < 1e-4
    assert torch.equal(copy.deepcopy(gm)(x), gm(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gm(x).shape == (2, 7)
    (mask,) = papr_fx.keep_masks(gm, x).values()
    scores = papr_fx.ops.resize_map(papr_fx.significance(gm, x), (8, 8))
    assert scores[mask].view(2, -1).amin() >= scores[~mask].view(2, -1).amin()
    assert not papr_fx.significance(gm, x).requires_grad
    assert papr_fx.report(gm).proposal_macs > 0


def test_a_users_module_is_not_changed():
    module = nn.Sequential(nn.Conv2d(16, 1, 1), nn.Flatten(1, 2)).train()
    gm = papr_fx.transform(ToyViT(Shape(image=(16, 24))).double(), network().float(), 0.5, saliency=module)
    assert gm.example().dtype == torch.float64
    assert module.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("saliency", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(saliency, dtype):
    gm = papr_fx.transform(ToyViT(Shape(image=(16, 24))).to(dtype).eval(), enliven(ConvNet()), 0.5, saliency=saliency)
    assert papr_fx.significance(gm, torch.randn(2, 3, 16, 24, dtype=dtype)).dtype in (torch.float32, torch.float64)


def test_random_scores_need_no_features():
    flat = nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), nn.Flatten(1, 2))
    assert maps("random", flat, torch.randn(2, 3, 8, 8)).shape == (2, 64, 64)
    many = torch.randn(50, 3, 32, 32)
    assert len({tuple(m.flatten().topk(10).indices.tolist()) for m in maps("random", toy_proposal(), many)}) == 50
