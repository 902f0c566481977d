"""Sources of the map: the mean, random scores, a user's function; and each of them in a transformed model."""

import copy

import pytest
import torch
from torch import nn

import papr_fx
from papr_fx.proposals.saliency import NAMES
from papr_fx.tracing.numerics import relative_error

from ..models import Shape, ToyViT, enliven, toy_proposal
from .networks import ConvNet, conv_net, maps_of


@pytest.fixture
def x():
    return torch.randn(3, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_psm_stays_the_mean(x):
    net = conv_net()
    assert relative_error(maps_of("psm", net, x), net.features(x).mean(1)) < 1e-12


@torch.no_grad()
def test_random_scores_follow_the_image_alone(x):
    net = conv_net()
    found = maps_of("random", net, x)
    assert torch.equal(found, maps_of("random", net, x))
    assert torch.equal(found[1:], maps_of("random", net, x[1:]))
    assert len(found.unique()) == found.numel()
    assert abs(float(found.mean()) - 0.5) < 0.1
    near = papr_fx.ops.resize_map(found, (14, 14))
    pairs = torch.stack([near[:, :, 1:].flatten(), near[:, :, :-1].flatten()])
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.1


@pytest.mark.parametrize("make", [lambda: lambda f: f.amax(1), lambda: nn.Sequential(nn.Conv2d(16, 1, 1), nn.Flatten(1, 2))])
@torch.no_grad()
def test_a_function_or_module_of_features(make, x):
    net, function = conv_net(), make()
    if isinstance(function, nn.Module):
        function = function.double()
    assert relative_error(maps_of(function, net, x), function(net.features(x))) < 1e-12
    with pytest.raises(papr_fx.ProposalError, match="saliency must map features"):
        maps_of(lambda f: f.mean(), net, x)


@pytest.mark.parametrize("saliency", ["mean", None, nn.Linear, 3])
def test_arguments(saliency):
    with pytest.raises(papr_fx.ArgumentError, match='saliency must be one of "psm"'):
        papr_fx.transform(ToyViT(Shape()), toy_proposal(), 0.5, saliency=saliency)


@pytest.mark.parametrize("saliency", ["cam", "expected-cam", "gradcam", "scorecam"])
def test_a_proposal_without_classes_is_refused(saliency):
    with pytest.raises(papr_fx.ProposalError, match="needs the proposal's classifier"):
        papr_fx.transform(ToyViT(Shape()), toy_proposal(), 0.5, saliency=saliency)
    flat = nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), nn.Flatten(1, 2))
    with pytest.raises(papr_fx.ProposalError, match="returns one map"):
        papr_fx.transform(ToyViT(Shape()), flat, 0.5, saliency=saliency)


QUICK = ("psm", "cam", "scorecam")  # a mean, and what needs a classifier, with and without another pass
CAPTURED = [pytest.param(name, "aot_eager", marks=() if name in QUICK else pytest.mark.slow) for name in NAMES]
# Of those that are lowered, "scorecam" passes through the network again; tests/test_transform.py lowers "psm".
LOWERED = pytest.param("scorecam", "inductor", marks=pytest.mark.slow)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("saliency", "backend"), [*CAPTURED, LOWERED])
@torch.no_grad()
def test_in_a_transformed_model(saliency, backend):
    """Compiled in one graph, in autocast, copied, and the tokens kept are those of the map's best."""
    model = ToyViT(Shape(image=(16, 24))).eval()
    gm = papr_fx.transform(model, enliven(ConvNet()), 0.5, saliency=saliency)
    x = torch.randn(2, 3, 16, 24)
    torch.compiler.reset()
    fast = torch.compile(gm, fullgraph=True, backend=backend)
    assert relative_error(fast(x), gm(x)) < 1e-4
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
    gm = papr_fx.transform(ToyViT(Shape(image=(16, 24))).double(), conv_net().float(), 0.5, saliency=module)
    assert gm.example().dtype == torch.float64
    assert module.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in module.parameters())


@pytest.mark.one_in(2)
@pytest.mark.parametrize("saliency", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(saliency, dtype):
    gm = papr_fx.transform(ToyViT(Shape(image=(16, 24))).to(dtype).eval(), enliven(ConvNet()), 0.5, saliency=saliency)
    assert papr_fx.significance(gm, torch.randn(2, 3, 16, 24, dtype=dtype)).dtype in (torch.float32, torch.float64)


def test_random_scores_need_no_features():
    flat = nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), nn.Flatten(1, 2))
    assert maps_of("random", flat, torch.randn(2, 3, 8, 8)).shape == (2, 64, 64)
    many = torch.randn(50, 3, 32, 32)
    assert len({tuple(m.flatten().topk(10).indices.tolist()) for m in maps_of("random", toy_proposal(), many)}) == 50
