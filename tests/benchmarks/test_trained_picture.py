"""The picture of a dense model beside pruned ones, with a toy model."""

import torch
from PIL import Image

from benchmarks import trained_picture, trained_vit
from benchmarks.trained_picture import draw, maps_of, photograph

from ..models import enliven, toy_proposal
from .test_trained_vit import Dense


def test_a_row_for_each_photograph(monkeypatch, tmp_path):
    monkeypatch.setattr(trained_vit, "lite0", toy_proposal)
    monkeypatch.setattr(trained_vit, "LITE0_STATISTICS", trained_vit.STATISTICS)
    images = torch.rand(2, 3, 8, 12)
    maps = maps_of(enliven(Dense()).eval(), images, 0.5)
    assert list(maps) == ["dense", "drop", "coarse"]
    assert all(found.shape == maps["dense"].shape for found in maps.values())
    assert not torch.allclose(maps["dense"], maps["drop"])
    draw(tmp_path / "maps.png", images, maps, 0.5)
    with Image.open(tmp_path / "maps.png") as picture:
        assert picture.size == (616, 322)


def test_photographs_are_squares_of_their_centre():
    for name in trained_picture.PHOTOGRAPHS:
        found = photograph(name)
        assert found.shape == (1, 3, 224, 224)
        assert 0 <= found.min() < 0.1 < 0.7 < found.max() <= 1
