"""Rules for a coarse background, against the project's own."""

import pytest
import timm
import torch
from torch import nn

import papr_fx
from benchmarks.coarse_levels import levels, quads_first, rules, run, shared_out

PSM = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))


def covered(rows):
    """How many tokens stand for each place of a grid of 8 x 8."""
    count = torch.zeros(8, 8, dtype=torch.int64)
    for row in rows.tolist():
        side, first = (1, 0) if row < 64 else (2, 64) if row < 80 else (4, 80)
        top, left = divmod(row - first, 8 // side)
        count[top * side : (top + 1) * side, left * side : (left + 1) * side] += 1
    return count


@pytest.mark.parametrize("k", [30, 20])
@pytest.mark.parametrize("squares", [0, 1, 2])
def test_every_place_has_one_token(k, squares):
    rows = quads_first(PSM, k, squares)
    assert k - 3 < len(rows) <= k
    assert (covered(rows) == 1).all()
    best = torch.nn.functional.avg_pool2d(PSM[None], 2).flatten().argmax()
    top, left = divmod(int(best), 4)
    assert covered(rows[rows < 64])[2 * top, 2 * left] == 1


def test_a_share_of_fine_patches():
    rows = shared_out(PSM, 20, 0.5)
    assert [int((rows < 64).sum()), int((rows >= 64).sum())] == [8, 8 + 4]
    assert covered(rows).max() == 1


def test_the_first_rule_is_the_projects():
    model = timm.create_model("vit_tiny_patch16_224", img_size=128, depth=1, embed_dim=32, num_heads=2, num_classes=0).eval()
    nn.init.normal_(model.pos_embed)
    images = torch.randn(2, 3, 128, 128)
    options = {"background": "coarse", "input_stats": "shared", "verify": False}
    gm = papr_fx.transform(model, nn.AvgPool2d(16), 0.5, example_input=images[:1], **options)
    with torch.no_grad():
        found = run(model, next(iter(rules().values())), 32, lambda x: papr_fx.significance(gm, x), images)
        torch.testing.assert_close(found, gm(images), rtol=1e-4, atol=1e-5)
    assert levels(model, images).shape == (2, 64 + 16 + 4, 32)
