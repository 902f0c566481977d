"""Listing the architectures of a library."""

import pytest

import papr_fx
from papr_fx.evaluation.zoo import architectures


def test_what_cannot_be_listed():
    with pytest.raises(papr_fx.ArgumentError, match="library must be one of"):
        architectures("keras")
    with pytest.raises(papr_fx.ArgumentError, match="has no model or family that matches"):
        architectures("timm", ["vit_of_my_own"])
