"""Negative control: a model in which a wrong position does not show."""

import pytest
import torch
from torch import Tensor

import papr_fx
from papr_fx.proof.prove import prove

from ..models import Shape, ToyViT, toy_proposal
from .parts import case_of, failures


class Deaf(ToyViT):
    """Ignores its tokens."""

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)[:, 0] * 0 + self.query[:, 0])


class Faint(ToyViT):
    """The effect of its tokens on the output is below the rounding of float32."""

    def classify(self, x: Tensor) -> Tensor:
        return self.query.sum() + 1e-6 * super().classify(x)


class OnlyFloat32(Faint):
    def tokens(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return super().tokens(x)


def test_only_the_control_finds_an_output_that_ignores_tokens():
    found = failures(case_of(Deaf(Shape()), narrow=False))
    assert list(found) == ["negative control"]
    assert "with one position replaced at `add`" in found["negative control"]


def test_an_output_that_ignores_tokens_is_caught():
    with pytest.raises(papr_fx.VerifyError, match="negative control"):
        papr_fx.transform(Deaf(Shape()), toy_proposal(), 0.5)


def test_a_model_that_float32_is_too_coarse_for_is_proved_in_float64():
    model = Faint(Shape()).eval()
    found = prove(model, papr_fx.transform(model, toy_proposal(), 0.5, verify=False))
    assert found.tolerance == 1e-9
    assert found.control > 10 * found.permutation


def test_a_model_that_does_not_run_in_float64_gets_the_verdict_of_float32():
    with pytest.raises(papr_fx.VerifyError, match="negative control"):
        papr_fx.transform(OnlyFloat32(Shape()), toy_proposal(), 0.5)
