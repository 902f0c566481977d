"""Slices of the tokens: those that take others where there are fewer are refused, with and without the proof."""

import pytest
import torch

import papr_fx
from papr_fx.tracing.numerics import relative_error

from ..models import Shape, ToyViT, enliven, images, toy_proposal

SHAPE = Shape()  # one class token and 16 patches


class Sliced(ToyViT):
    """Averages what a slice of the normed tokens leaves."""

    def __init__(self, cut):
        super().__init__(SHAPE)
        self.cut = cut
        enliven(self)

    def classify(self, x):
        return self.head(self.cut(self.norm(x)).mean(1))


WRONG = {
    "as many from the end": lambda x: x[:, -16:],
    "behind an ellipsis": lambda x: x[..., -16:, :],
    "behind all that are kept": lambda x: x[:, 16:],
    "the first half": lambda x: x[:, :9],
    "the last one": lambda x: x[:, -1:],
}
RIGHT = {
    "without the class token": lambda x: x[:, 1:],
    "the class token": lambda x: x[:, :1],
    "without it, from the end": lambda x: x[:, -(x.shape[1] - 1) :],
    "all": lambda x: x[:, :],
    "all patches, from the end": lambda x: x[:, 1:][:, -16:],
    "of the channels": lambda x: x[:, :, :8],
}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_a_slice_that_takes_other_tokens_is_refused(name, verify):
    with pytest.raises(papr_fx.NoSiteError, match=r"`getitem\w*` takes \[.*\] of 1[67] tokens: of fewer"):
        papr_fx.transform(Sliced(WRONG[name]).eval(), toy_proposal(), 0.5, mode="tokens", verify=verify)


@torch.no_grad()
@pytest.mark.parametrize("name", RIGHT)
def test_a_slice_that_takes_the_same_tokens(name):
    model = Sliced(RIGHT[name]).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    x = images(SHAPE, 2)
    (mask,) = papr_fx.keep_masks(gm, x).values()
    rows = torch.cat([torch.ones(2, 1, dtype=torch.bool), mask.flatten(1)], 1)
    tokens = torch.stack([sample[kept] for sample, kept in zip(model.tokens(x), rows, strict=True)])
    for block in model.blocks:
        tokens = block(tokens)
    assert relative_error(gm(x), model.classify(tokens)) < 1e-12
