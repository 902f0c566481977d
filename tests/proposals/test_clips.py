"""Proposals for clips: where networks are cut, and which networks are refused."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.video import mc3_18, r2plus1d_18, r3d_18, s3d

import papr_fx
from papr_fx.proposals.build import ImageSpec, ProposalOptions, build_proposal
from papr_fx.tracing.numerics import relative_error

from ..models import Shape, ToyViT
from ..models.clips import ClipViT, clip_proposal, huggingface


@pytest.mark.parametrize(
    "network",
    [r3d_18, *(pytest.param(build, marks=pytest.mark.slow) for build in (mc3_18, r2plus1d_18, s3d))],
    ids=lambda build: build.__name__,
)
@torch.no_grad()
def test_proposals_of_torchvision(network):
    torch.manual_seed(0)
    proposal = network().eval()
    for module in proposal.modules():  # so that a wrong fold shows
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(1, 3, *((16, 224, 224) if network is s3d else (8, 48, 64)))
    found = build_proposal(proposal, nn.Identity(), ImageSpec.of(x, "BCTHW"), ProposalOptions(input_stats="shared"))
    stages = [proposal.features] if network is s3d else [proposal.stem, *(getattr(proposal, f"layer{n}") for n in (1, 2, 3, 4))]
    assert relative_error(found(x), nn.Sequential(*stages)(x).mean(1)) < 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_x3d_is_cut_before_its_pooling():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's own warnings
        from pytorchvideo.models.x3d import create_x3d
    torch.manual_seed(0)
    proposal = create_x3d(input_clip_length=4, input_crop_size=64, model_num_class=5).eval()
    model = ClipViT((4, 16, 16), 0).eval()
    example = torch.zeros(1, 3, 8, 64, 48)
    gm = papr_fx.transform(model, proposal, 0.5, example_input=example, proposal_size=(4, 64, 64))
    x = torch.randn(2, 3, 8, 64, 48)
    small = F.interpolate(x, (4, 64, 64), mode="trilinear", align_corners=False)
    pool = proposal.blocks[-1].pool
    features = pool.pre_act(pool.pre_norm(pool.pre_conv(nn.Sequential(*proposal.blocks[:-1])(small))))
    assert relative_error(papr_fx.significance(gm, x), features.mean(1)) < 1e-4
    gm = papr_fx.transform(model, proposal, 0.5, example_input=example, proposal_size=(3, 64, 64))
    small = F.interpolate(x, (3, 64, 64), mode="trilinear", align_corners=False)  # its pooling takes no fewer than 4 frames
    features = pool.pre_act(pool.pre_norm(pool.pre_conv(nn.Sequential(*proposal.blocks[:-1])(small))))
    assert relative_error(papr_fx.significance(gm, x), features.mean(1)) < 1e-4


def test_only_the_last_pooling_is_made_global():
    network = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.AvgPool2d(8), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten())
    with pytest.raises(papr_fx.ProposalError, match="Output size is too small"):
        papr_fx.transform(ToyViT(Shape()), network, 0.5)
    headed = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.AvgPool2d(8), nn.Flatten())
    papr_fx.transform(ToyViT(Shape()), headed, 0.5)


class FoldsFrames(nn.Module):
    """A network that continues with each frame as an image after its 3-D convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv3d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, 2, 1), nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        b, _, t, _, _ = x.shape
        x = self.conv(self.stem(x).transpose(1, 2).flatten(0, 1)).relu()
        return self.head(x.unflatten(0, (b, t)).mean((1, 3, 4)))


def test_convolutions_after_the_last_features_of_clips_are_refused():
    with pytest.raises(papr_fx.ProposalError, match="has convolutions .* after"):
        papr_fx.transform(ClipViT((2, 3, 4), 0), FoldsFrames(), 0.5, example_input=torch.zeros(1, 3, 4, 12, 12))


class PooledInTime(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(2)


@torch.no_grad()
def test_features_pooled_in_time_are_not_the_map():
    proposal = PooledInTime(nn.Conv3d(3, 16, 3, padding=1), nn.Tanh())
    gm = papr_fx.transform(ClipViT((2, 3, 4), 0), proposal, 0.5, example_input=torch.zeros(1, 3, 4, 12, 12))
    x = torch.randn(1, 3, 4, 12, 12)
    assert relative_error(papr_fx.significance(gm, x), nn.Sequential(*proposal)(x).mean(1)) < 1e-5


@torch.no_grad()
def test_statistics_and_sizes_of_clips_in_both_orders():
    statistics = (((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    (mean, std), (own_mean, own_std) = [[torch.tensor(v).view(3, 1, 1, 1) for v in pair] for pair in statistics]
    x = torch.randn(2, 3, 6, 48, 48)
    size = (4, 24, 32)
    by_hand = F.interpolate((x * std + mean - own_mean) / own_std, size, mode="trilinear", align_corners=False)
    expected = clip_proposal().eval()(by_hand).mean(1)
    options = {"input_stats": statistics, "proposal_size": size, "verify": False}
    first = papr_fx.transform(ClipViT((3, 12, 16), 0), clip_proposal(), 0.5, example_input=x, **options)
    assert relative_error(papr_fx.significance(first, x), expected) < 1e-5
    second = papr_fx.transform(huggingface("VivitForVideoClassification").float(), clip_proposal(), 0.5, **options)
    assert relative_error(papr_fx.significance(second, x.transpose(1, 2)), expected) < 1e-5
    shorter = papr_fx.transform(ClipViT((3, 12, 16), 0), clip_proposal(), 0.5, example_input=x, proposal_size=24, verify=False)
    assert papr_fx.significance(shorter, x).shape == (2, 6, 24, 24)
