"""Part 16 of the proof: what code behind the last block reads."""

import pytest
from torch import Tensor

import papr_fx
from papr_fx.dataflow import shorter_run, slices

from ..models import Shape, ToyViT
from ..models.traps import Behind, Sliced
from .parts import case_of, failures


class LastToken(Behind):
    """Reads the first token behind the patches, by its number."""

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)[:, 17:18].sum(1))


@pytest.fixture
def unguarded(monkeypatch):
    """Planning lets slices pass that take other tokens."""
    for module in (shorter_run, slices):
        monkeypatch.setattr(module, "other_tokens", lambda run, node: "")


@pytest.mark.parametrize("model", [lambda: Sliced(Shape()), LastToken])
def test_planning_refuses_a_slice_of_other_tokens(model):
    with pytest.raises(papr_fx.NoSiteError, match="of fewer tokens it would take others"):
        case_of(model())


def test_only_reads_finds_a_slice_of_other_tokens(unguarded):
    assert list(failures(case_of(Sliced(Shape())))) == ["reads"]


def test_a_token_behind_the_patches_that_is_no_longer_read(unguarded):
    assert "the outputs [] read token 17, of all 19 the outputs [0]" in failures(case_of(LastToken()))["reads"]


@pytest.mark.parametrize("pool", ["cls", "avg", "patches", "map"])
def test_heads_that_read_what_they_should(pool):
    assert not failures(case_of(ToyViT(Shape(pool=pool, prefix=2))))


def test_several_outputs_and_a_tensor_without_images():
    class Several(ToyViT):
        def classify(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.head(x[:, 0]), x[:, 1:].amax(1), self.query * 2, x.mean()

    assert not failures(case_of(Several(Shape())))
