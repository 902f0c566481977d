"""What a page says of narrowing and bfloat16, and that it is read back as it was written."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from papr_fx.evaluation import columns, page
from papr_fx.evaluation.survey import Row
from papr_fx.evaluation.zoo import Architecture

from ..models import Shape, ToyViT

SHAPE = Shape((32, 48), (8, 8))


class Toy(Architecture):
    """An architecture of this test."""

    def create(self) -> nn.Module:
        return {
            "class": lambda: ToyViT(replace(SHAPE, pool="cls")),
            "mean": lambda: ToyViT(SHAPE),
            "fixed": Fixed,
            "fade": Fade,
        }[self.name]().eval()

    def images(self, model: nn.Module) -> torch.Tensor:
        return torch.zeros(1, 3, *SHAPE.image, dtype=model.head.weight.dtype)


class Fixed(ToyViT):
    """Takes float32 alone."""

    def __init__(self) -> None:
        super().__init__(SHAPE)

    def classify(self, x):
        return super().classify(x) @ torch.ones(7, 7)


class Fade(ToyViT):
    """Has no precision to spare, dense or pruned."""

    def __init__(self) -> None:
        super().__init__(SHAPE)

    def classify(self, x):
        return (super().classify(x) + 1000) - 1000


def row(name):
    return Row(Toy("timm", "toy", name), "tokens", "logits", 1, "17 -> 9", "proved")


@pytest.mark.parametrize(("name", "narrowed", "half"), [("class", "yes", "yes"), ("mean", "no", "yes"), ("fade", "no", "yes")])
def test_what_is_said(name, narrowed, half):
    found = columns.tried(row(name), 0.5)
    assert found.narrowed == narrowed
    assert found.bfloat16.startswith(half)


def test_further_off_than_the_dense_model(monkeypatch):
    errors = iter([0.5, 0.2])
    monkeypatch.setattr(columns, "_rounding", lambda _: next(errors))
    assert columns.tried(row("mean"), 0.5).bfloat16 == "off by 5e-01"


def test_what_does_not_run_in_bfloat16():
    found = columns.tried(row("fixed"), 0.5)
    assert found.bfloat16.startswith("no: ")
    text = page.table([found])
    assert "| reason 1" in text
    assert f"reason 1: {found.bfloat16}." in text


ROWS = [
    Row(Architecture("timm", "vision_transformer", "vit_tiny_patch16_224"), "tokens", "logits", 1, "197 -> 99", "proved"),
    Row(Architecture("timm", "eva", "eva_x"), "tokens", "features", 1, "197 -> 99", "as vit_tiny_patch16_224"),
    Row(Architecture("timm", "hiera", "hiera_x"), reason="it (a, b) has no place: 1. x. y"),
    Row(
        Architecture("torchvision", "convnext", "convnext_tiny"),
        "pixels",
        "logits",
        18,
        "3136 -> 1568",
        "proved",
        "",
        "",
        "no: a",
    ),
]


def test_a_page_is_read_back():
    assert page.read(page.tables(ROWS)) == ROWS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of the workers' own imports
def test_columns_are_filled_in_where_they_are_empty():
    lines: list[str] = []
    found = columns.with_columns(ROWS, patterns=["vit_*"], progress=lines.append)
    assert [r.narrowed for r in found] == ["yes", "yes", "", ""]
    assert [r.bfloat16 for r in found] == ["yes", "yes", "", "no: a"]
    assert lines == ["vit_tiny_patch16_224: narrowed yes, bfloat16 yes"]
    assert columns.with_columns(found, patterns=["vit_*"], progress=lines.append) == found
    assert len(lines) == 1
