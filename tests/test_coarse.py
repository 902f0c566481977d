"""A coarse background against a transcription by hand, and what users ask of it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import papr_fx
from papr_fx.peers import TokenPropagation
from papr_fx.planning.module import sibling
from papr_fx.tracing.numerics import relative_error

from .coarse_by_hand import coarse_by_hand, groups_by_hand
from .models import Shape, ToyViT, attentions, images, toy_proposal
from .models.embeddings import Rescaled
from .models.hierarchical import FAMILIES
from .models.positioned import positioned
from .models.vits import BatchNormStem

ratios = st.floats(0.02, 0.999)


@st.composite
def shapes(draw):
    """ViTs with or without prefix tokens, on even and odd grids."""
    patch = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    grid = draw(st.tuples(st.integers(2, 5), st.integers(2, 5)))
    return Shape(
        image=(patch[0] * grid[0], patch[1] * grid[1]),
        patch=patch,
        prefix=draw(st.sampled_from([0, 1, 3])),
        pool=draw(st.sampled_from(["avg", "patches", "map"])),
        embed=draw(st.sampled_from(["conv", "linear", "unfold"])),
    )


def coarse(model, z=0.5, **options):
    """The model with a coarse background, not proved."""
    options = {"verify": False, "background": "coarse", **options}
    return papr_fx.transform(model, toy_proposal(), z, **options)


def maps_of(gm, x, grid):
    """The significance of each patch."""
    return F.interpolate(papr_fx.significance(gm, x)[:, None], grid, mode="bicubic", align_corners=True)[:, 0]


@settings(max_examples=6)
@given(shapes(), st.lists(ratios, min_size=3, max_size=3), st.integers(1, 3), st.integers(0, 9))
@torch.no_grad()
def test_equals_a_transcription_by_hand(shape, several, batch, seed):
    model, x = ToyViT(shape).double().eval(), images(shape, batch, seed)
    gm = coarse(model)
    for z in several:
        expected = coarse_by_hand(model, maps_of(gm, x, shape.grid), x, z)
        assert relative_error(sibling(gm, z=z)(x), expected) < 1e-9


@pytest.mark.one_in(2)
@settings(max_examples=2)
@given(st.sampled_from([(4, 4), (3, 5), (5, 4)]), st.sampled_from([0, 1, 3]), st.lists(ratios, min_size=2, max_size=2))
@pytest.mark.parametrize("kind", ["rotary", "rotary, four axes", "bias", "bias on scores"])
@torch.no_grad()
def test_positions_in_attention_are_averaged(kind, grid, prefix, several):
    shape = Shape(image=(2 * grid[0], 3 * grid[1]), prefix=prefix)
    model, x = positioned(shape, kind).double().eval(), images(shape, 2)
    gm = coarse(model)
    for z in several:
        expected = coarse_by_hand(model, maps_of(gm, x, grid), x, z)
        assert relative_error(sibling(gm, z=z)(x), expected) < 1e-9


ODD = Shape(image=(10, 15), prefix=2)  # 5 x 5 patches, 3 x 3 cells, four of them whole


@torch.no_grad()
def test_the_ratio_can_be_changed_and_at_one_the_model_is_dense():
    model, x = ToyViT(ODD).double().eval(), images(ODD, 2)
    gm = coarse(model)
    half, dense = gm(x), model(x)
    papr_fx.set_keep_ratio(gm, 1.0)
    assert torch.equal(gm(x), dense)
    assert not [node for node in gm.graph.nodes if node.name.startswith("papr")]
    assert torch.equal(papr_fx.token_map(gm, x), torch.arange(2, 27).view(1, 5, 5).expand(2, 5, 5))
    assert papr_fx.keep_masks(gm, x)[5, 5].all()
    papr_fx.set_keep_ratio(gm, 0.5)
    assert torch.equal(gm(x), half)
    assert torch.equal(coarse(model, 1.0)(x), dense)


@pytest.mark.parametrize(
    ("z", "kept", "fine", "cells", "dropped"), [(0.2, 7, 0, 5, 4), (0.5, 14, 4, 8, 0), (0.9, 23, 16, 5, 0)]
)
@torch.no_grad()
def test_masks_maps_and_reports_agree(z, kept, fine, cells, dropped):
    model, x = ToyViT(ODD).double().eval(), images(ODD, 3)
    gm = coarse(model, z)
    (site,) = papr_fx.report(gm).sites
    assert (site.kept, site.fine, site.coarse, site.dropped) == (kept, fine, cells, dropped)
    assert f"background: {fine} fine patches, {cells} coarse tokens" in str(papr_fx.report(gm))
    mask, places = papr_fx.keep_masks(gm, x)[5, 5], papr_fx.token_map(gm, x)
    for sample, fines, found in zip(maps_of(gm, x, (5, 5)), mask, places, strict=True):
        expected = torch.full((25,), -1)
        for place, group in enumerate(groups_by_hand(sample, z, 2)):
            expected[group] = 2 + place
        assert torch.equal(found.flatten(), expected)
        assert fines.sum() == fine
        assert torch.equal(fines, (found >= 2) & (found < 2 + fine))


class Headless(ToyViT):
    """Returns its tokens."""

    def classify(self, x):
        return self.norm(x)


@torch.no_grad()
def test_coarse_tokens_fill_their_places():
    model, x = Headless(ODD).double().eval(), images(ODD, 2)
    gm = coarse(model, 0.2)
    tokens, places = gm(x), papr_fx.token_map(gm, x)
    for some in (tokens, tokens[:, 2:]):
        restored = papr_fx.restore_grid(gm, some, x, fill=7.0)
        for sample, row, column in torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(5)).tolist():
            place = places[sample, row, column]
            expected = tokens[sample, place] if place >= 0 else torch.full((8,), 7.0).double()
            assert torch.equal(restored[sample, :, row, column], expected)


def test_a_token_map_is_for_tokens():
    model = FAMILIES["ConvNeXt"].model().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 64, 64).double(), verify=False)
    with pytest.raises(papr_fx.ArgumentError, match="token_map is for token models"):
        papr_fx.token_map(gm, torch.zeros(1, 3, 64, 64).double())


class ConvStem(ToyViT):
    """Embeds patches by convolutions whose windows overlap."""

    def __init__(self) -> None:
        super().__init__(Shape())
        self.proj = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, (2, 3), (2, 3)))


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (ToyViT(Shape()), {"background": "keep"}, "'keep' is for pixel operators, and ToyViT is pruned by tokens"),
        (ToyViT(Shape()), {"background": "zero", "mode": "tokens"}, "'zero' does not fit tokens"),
        (ToyViT(Shape()), {"mode": "pixels"}, "'coarse' does not fit pixels"),
        (ToyViT(Shape()), {"background": "drop", "mode": "pixels"}, "'drop' does not fit pixels"),
        (ToyViT(Shape()), {"background": "rough"}, "background must be one of 'auto', 'keep', 'zero', 'drop', 'coarse'"),
        (ToyViT(Shape()), {"merge": TokenPropagation(2)}, "connects patches that touch in the image"),
        (
            Rescaled(Shape()),
            {},
            r"`mul_` changes the images in place, so they cannot be embedded a second time. Write `x = x.mul",
        ),
        (ConvStem(), {}, r"the windows of `proj.0` overlap \(Conv2d"),
        (
            attentions.with_attention(lambda: attentions.Numbered(8, 2, True)),
            {},
            r"`unsqueeze` \(17, 1\) holds torch.int64, which has none",
        ),
    ],
)
def test_what_has_no_coarse_background_says_why(model, options, reason):
    with pytest.raises(papr_fx.PaprError, match=reason):
        coarse(model.eval(), **options)


@pytest.mark.parametrize("background", ["drop", "coarse"])
def test_pixel_models_have_no_background_of_tokens(background):
    model = FAMILIES["ConvNeXt"].model().eval()
    with pytest.raises(papr_fx.NoSiteError, match=f"background='{background}' is for models that run on tokens"):
        coarse(model, background=background, example_input=torch.zeros(1, 3, 64, 64).double())


@torch.no_grad()
def test_drop_is_what_auto_does():
    model, x = ToyViT(ODD).double().eval(), images(ODD, 2)
    expected = papr_fx.transform(model, toy_proposal(), 0.5, verify=False)
    gm = coarse(model, background="drop")
    assert torch.equal(gm(x), expected(x))
    assert str(papr_fx.report(gm)) == str(papr_fx.report(expected))
    mask = papr_fx.keep_masks(gm, x)[5, 5]
    assert torch.equal(papr_fx.token_map(gm, x) >= 0, mask)


def test_statistics_of_batches_are_refused_in_training_only():
    model = BatchNormStem().double().eval()
    gm = coarse(model, verify=True)
    with pytest.raises(
        papr_fx.NoSiteError, match="cannot be pruned in training mode: background='coarse': sought an embedding"
    ):
        gm.train()
