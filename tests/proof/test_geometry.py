"""Geometry: positions in another order than the map's."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import papr_fx
from papr_fx.ops import TokenRows
from papr_fx.passes import prune_tokens

from ..models import Shape, ToyViT, enliven, toy_proposal
from ..models.hierarchical import Rolled
from .parts import OF_THE_WHOLE, case_of, failures


class ColumnMajor(ToyViT):
    def patches(self, x: Tensor) -> Tensor:
        return self.proj(x).transpose(2, 3).flatten(2).transpose(1, 2)


def test_only_geometry_finds_tokens_in_column_major_order():
    found = failures(case_of(ColumnMajor(Shape())))
    assert [name for name in found if name not in OF_THE_WHOLE] == ["geometry"]
    assert "changing patch (0, " in found["geometry"]


def test_only_geometry_finds_pixels_out_of_order():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), Rolled(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    found = failures(case_of(enliven(model), example_input=torch.zeros(1, 3, 32, 48)))
    assert [name for name in found if name not in OF_THE_WHOLE] == ["geometry"]
    assert "not in row-major order" in found["geometry"]


def test_tokens_in_column_major_order_are_caught():
    with pytest.raises(papr_fx.VerifyError, match="geometry: changing patch"):
        papr_fx.transform(ColumnMajor(Shape()), toy_proposal(), 0.5)


def test_a_wrong_grid_is_caught(monkeypatch):
    find_site = prune_tokens.find_site

    def transposed(graph, blocks, suffix=0):
        site = find_site(graph, blocks, suffix)
        join = site.flattening.join
        join = join._replace(grid=join.grid[::-1], axes=join.axes[::-1])
        return replace(site, rows=TokenRows(join.grid, site.rows.prefix), flattening=site.flattening._replace(join=join))

    monkeypatch.setattr(prune_tokens, "find_site", transposed)
    with pytest.raises(papr_fx.VerifyError, match="geometry"):
        papr_fx.transform(ToyViT(Shape(image=(8, 18))), toy_proposal(), 0.5)


class SummaryToken(ToyViT):
    """Its first token is not a constant but a summary of the patches."""

    def tokens(self, x: Tensor) -> Tensor:
        patches = self.patches(x)
        return torch.cat([self.first + patches.mean(1, keepdim=True), patches], dim=1) + self.pos


def test_prefix_tokens_that_the_image_moves_are_refused():
    with pytest.raises(papr_fx.VerifyError, match="geometry: the first 1 of `add.*` were taken for tokens beside the patches"):
        papr_fx.transform(SummaryToken(Shape()), toy_proposal(), 0.5)
