"""Training: code that runs in training mode only."""

import pytest
import timm
import torch
from torch import Tensor, nn

import papr_fx
from papr_fx.passes import prune_pixels

from ..models import Shape, ToyViT, toy_proposal
from .parts import case_of, failures


class TrainingOnly(ToyViT):
    """Right in eval mode; in training mode its head picks a token by index."""

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x[:, 3])) if self.training else super().classify(x)


def test_only_training_finds_a_head_that_picks_a_token_in_training():
    found = failures(case_of(TrainingOnly(Shape())))
    assert list(found) == ["training"]
    assert "in training mode, with all positions kept in random order" in found["training"]


def test_a_head_that_picks_a_token_in_training_is_caught():
    with pytest.raises(papr_fx.VerifyError, match="training: in training mode"):
        papr_fx.transform(TrainingOnly(Shape()), toy_proposal(), 0.5)


class Augmented(nn.Module):
    """Positions that are augmented in training, by a method of another name than forward."""

    def table(self, like: Tensor) -> Tensor:
        return like * torch.rand_like(like[:1]) if self.training else like


class AugmentedInTraining(ToyViT):
    def __init__(self) -> None:
        super().__init__(Shape())
        self.rope = Augmented()

    def tokens(self, x: Tensor) -> Tensor:
        return super().tokens(x) + self.rope.table(self.pos)


def test_methods_that_differ_in_training():
    model = AugmentedInTraining().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    x = torch.randn(2, 3, 8, 12)
    assert torch.equal(gm(x), gm(x))
    gm.train()
    for module in gm.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    assert not torch.equal(gm(x), gm(x))


def test_images_that_are_mixed_up_in_training_only(monkeypatch):
    """Its pixel operators have another background in training: they write to the next image there."""
    write = prune_pixels.write_pixels

    def wrong(residual, branch, rows, layout, background):
        count = residual.movedim(layout.index("C"), -1).flatten(1, -2).shape[1] * len(residual)
        return write(
            residual, branch, (rows + count // len(residual)) % count if background == "keep" else rows, layout, background
        )

    monkeypatch.setattr(prune_pixels, "write_pixels", wrong)
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)).eval()
    with pytest.raises(papr_fx.VerifyError, match="training: in training mode"):
        papr_fx.transform(model, toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 64, 64))
