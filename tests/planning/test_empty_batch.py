"""A batch without images: the result has the model's shapes, and questions about it are answered."""

import pytest
import timm
import torch

import papr_fx
from papr_fx import peers

from ..models import Shape, ToyViT, toy_proposal
from ..models.clips import ClipViT, clip_proposal
from ..models.hierarchical import FAMILIES

MERGES = [None, papr_fx.Merge(2), peers.TokenFusion(2), peers.TokenPropagation(2), peers.AttentionPruning(2)]


@pytest.mark.parametrize("merge", MERGES, ids=lambda merge: type(merge).__name__)
@torch.no_grad()
def test_a_token_model_takes_an_empty_batch(merge):
    model = ToyViT(Shape()).eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, merge=merge, verify=False)
    x = torch.zeros(0, 3, *Shape().image)
    assert gm(x).shape == model(x).shape == (0, 7)
    papr_fx.set_keep_ratio(gm, 1.0)
    assert gm(x).shape == (0, 7)


def test_questions_about_an_empty_batch():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64).eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, output="features", verify=False)
    x = torch.zeros(0, 3, 64, 64)
    assert papr_fx.significance(gm, x).shape == (0, 64, 64)
    assert {grid: mask.shape for grid, mask in papr_fx.keep_masks(gm, x).items()} == {(4, 4): (0, 4, 4)}
    assert papr_fx.restore_grid(gm, gm(x), x).shape == (0, 192, 4, 4)


@pytest.mark.parametrize("name", ["ConvNeXt", "torchvision Swin"])
@torch.no_grad()
def test_a_hierarchical_model_takes_an_empty_batch(name):
    model = FAMILIES[name].model()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 64, 64), verify=False)
    x = torch.zeros(0, 3, 64, 64, dtype=torch.float64)
    assert gm(x).shape == model(x).shape
    assert all(len(mask) == 0 for mask in papr_fx.keep_masks(gm, x).values())


@pytest.mark.parametrize("proposal", [clip_proposal, toy_proposal], ids=["whole clips", "each frame"])
@torch.no_grad()
def test_a_clip_model_takes_an_empty_batch(proposal):
    model = ClipViT((2, 2, 3), 1).eval()
    gm = papr_fx.transform(model, proposal(), 0.4, example_input=torch.zeros(1, 3, 4, 8, 9), verify=False)
    assert gm(torch.zeros(0, 3, 4, 8, 9)).shape == (0, 7)
