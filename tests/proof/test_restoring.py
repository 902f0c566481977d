"""Restoring: dropped places that are filled from elsewhere, and kept tokens in wrong places."""

import pytest
import torch
from torch import Tensor, nn

import papr_fx
from papr_fx import ops
from papr_fx.passes import restore_places
from papr_fx.proof import restoring

from ..models import Shape, toy_proposal
from ..models.dense import ConvDecoder, DenseViT
from .parts import case_of, failures


def first_token(places: Tensor, grid) -> Tensor:
    """Fills with the first kept token, in order of the grid."""
    first = torch.where(places >= 0, torch.arange(places.shape[1]), places.shape[1]).amin(1, keepdim=True)
    return torch.where(places >= 0, places, places.gather(1, first))


def furthest(places: Tensor, grid) -> Tensor:
    filled = ops.fill_nearest(places, grid)
    return torch.where(places >= 0, places, filled.roll(5, 1))


def last_of_the_nearest(places: Tensor, grid) -> Tensor:
    """Ties go to the last place."""
    return ops.fill_nearest(places.flip(1), grid).flip(1)


@pytest.mark.parametrize("wrong", [first_token, furthest, last_of_the_nearest])
def test_only_this_part_finds_a_wrong_fill(wrong, monkeypatch):
    monkeypatch.setattr(restore_places, "fill_nearest", wrong)
    found = failures(case_of(ConvDecoder()))
    assert list(found) == ["restoring"]
    assert "places that `reshape` lays out hold another token" in found["restoring"]


def test_a_token_where_zeros_should_be(monkeypatch):
    def without_zeros(value, places, axis, *, zero):
        return ops.restore_places(value, places.clamp(min=0), axis)

    monkeypatch.setattr(restore_places, "restore_places", without_zeros)
    assert "restoring" in failures(case_of(ConvDecoder(), restore="zero"))


@pytest.mark.parametrize("shift", [1, 4])
def test_wrong_places_are_caught(shift, monkeypatch):
    def shifted(patches: Tensor, grid) -> Tensor:
        return ops.map_places(patches, grid).roll(shift, 1)

    monkeypatch.setattr(restore_places, "map_places", shifted)
    found = failures(case_of(ConvDecoder()))
    assert {"permutation", "restoring"} <= found.keys()
    with pytest.raises(papr_fx.VerifyError, match="permutation: with all positions kept"):
        papr_fx.transform(ConvDecoder(), toy_proposal(), 0.5)


def test_places_of_another_image_are_caught(monkeypatch):
    def next_image(patches: Tensor, grid) -> Tensor:
        return ops.map_places(patches.roll(1, 0), grid)

    monkeypatch.setattr(restore_places, "map_places", next_image)
    assert "permutation" in failures(case_of(ConvDecoder()))


class Alike(DenseViT):
    """Lays out tokens that are all alike, beside a head that is not."""

    def make(self) -> None:
        self.mix = nn.Conv2d(8, 8, 3, padding=1)

    def classify(self, x: Tensor) -> Tensor:
        grid = (0 * self.patch_tokens(x)).reshape(x.shape[0], *self.shape.grid, -1).permute(0, 3, 1, 2)
        return self.head(x.mean(1)) + self.head(self.mix(grid).mean((2, 3)))


def test_tokens_that_are_all_alike_show_nothing():
    assert "all tokens that `reshape` lays out are equal" in failures(case_of(Alike()))["restoring"]


@pytest.mark.parametrize("fill", ["nearest", "zero"])
def test_a_sound_rewrite_passes(fill):
    assert not failures(case_of(ConvDecoder(Shape(image=(6, 15), depth=1, prefix=2)), restore=fill))


def test_by_hand():
    assert restoring._tokens_by_hand((2, 3), torch.tensor([4, 0]), zero=False) == [1, 1, 0, 1, 0, 0]
    assert restoring._tokens_by_hand((2, 3), torch.tensor([4, 0]), zero=True) == [1, -1, -1, -1, 0, -1]
