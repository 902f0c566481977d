"""Real weights on a real photograph: the map keeps the subject."""

import timm
from PIL.Image import fromarray
from skimage.data import coffee
from timm.data import create_transform

import papr_fx
from papr_fx.proposals import LITE0_STATISTICS, lite0


def test_the_map_keeps_the_subject():
    """The espresso in its cup stands in rows 1 to 7 and columns 3 to 10 of the 14 x 14 patches (read off the photograph)."""
    model = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    half = (0.5,) * 3
    preprocess = create_transform(input_size=(3, 224, 224), crop_pct=0.9, interpolation="bicubic", mean=half, std=half)
    images = preprocess(fromarray(coffee()))[None]
    gm = papr_fx.transform(model, lite0(), 0.3, input_stats=((half, half), LITE0_STATISTICS))
    (mask,) = papr_fx.keep_masks(gm, images).values()
    subject = mask[0, 1:8, 3:11]
    chance = mask.sum() / mask.numel()
    assert 0.25 < chance < 0.35
    assert subject.float().mean() > 2.2 * chance
    papr_fx.set_keep_ratio(gm, 0.1)
    (mask,) = papr_fx.keep_masks(gm, images).values()
    assert mask[0, 1:8, 3:11].sum() / mask.sum() > 0.9
