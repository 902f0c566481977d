"""A coarse background against a transcription by hand, and what users ask of it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import papr_fx
from papr_fx.planning.module import sibling
from papr_fx.tracing.numerics import relative_error

from .coarse_by_hand import coarse_by_hand
from .models import Shape, ToyViT, images, toy_proposal
from .models.positioned import positioned

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
