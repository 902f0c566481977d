"""Outputs keep their classes, and may hold tensors without a batch axis."""

import copy
import pickle
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import papr_fx
from papr_fx.proof import traced
from papr_fx.tracing.numerics import structure_of, tensors_of

from ..models import Shape, ToyViT, images, toy_proposal


class Noted(dict):
    """A dictionary with an attribute, whose constructor takes something else."""

    def __init__(self, note: str) -> None:
        super().__init__()
        self.note = note


class Levels(list):
    pass


class Named(NamedTuple):
    logits: Tensor
    twice: Tensor


@dataclass
class Answer:
    logits: Tensor
    extra: object = None


@dataclass(frozen=True)
class Computed:
    logits: Tensor
    twice: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "twice", self.logits * 2)


def grouped(y: Tensor) -> defaultdict:
    found = defaultdict(list)
    found["a"].append(y)
    return found


def noted(y: Tensor) -> Noted:
    found = Noted("as made")
    found["logits"] = y
    return found


CONTAINERS = {
    "OrderedDict": lambda y: OrderedDict(logits=y, twice=y * 2),
    "defaultdict": grouped,
    "dict subclass": noted,
    "list subclass": lambda y: Levels([y, y * 2]),
    "named tuple": lambda y: Named(y, y * 2),
    "dataclass": lambda y: Answer(y, OrderedDict(twice=y * 2)),
    "frozen dataclass": Computed,
    "nested": lambda y: {"levels": OrderedDict(one=[y, (y * 2, None)])},
}

# Tensors of a model with logits y and parameter p that do not hold one value per image on their first axis.
SHAPES = {
    "0-dim": lambda y, p: (y, p.sum().exp()),
    "table": lambda y, p: (y, p * 2),
    "mean over the batch": lambda y, p: (y, y.mean()),
    "only a mean": lambda y, p: y.mean(),
    "batch last": lambda y, p: y.t(),
    "squeezed": lambda y, p: y.squeeze(),
}


class Returns(nn.Module):
    def __init__(self, answer) -> None:
        super().__init__()
        self.model, self.answer, self.image_size = ToyViT(Shape()), answer, Shape().image
        self.table = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor):
        return self.answer(self.model(x), self.table)


def check_output(model: nn.Module) -> nn.Module:
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    x = images(Shape(), 2, dtype=torch.float32)
    assert structure_of(gm(x)) == structure_of(model(x))
    papr_fx.set_keep_ratio(gm, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(gm(x)), tensors_of(model(x)), strict=True))
    return gm


@pytest.mark.parametrize("answer", CONTAINERS.values(), ids=CONTAINERS.keys())
def test_an_output_keeps_its_class(answer):
    model = Returns(lambda y, p: answer(y)).eval()
    gm = check_output(model)
    x = images(Shape(), 2, dtype=torch.float32)
    assert structure_of(copy.deepcopy(gm)(x)) == structure_of(gm(x))
    assert pickle.loads(pickle.dumps(gm.plan)).eval.dense
    assert papr_fx.graph_diff(model, gm) == ""


class Odd(dict):
    """Its state is not that of its attributes."""

    def __getstate__(self):
        return 3

    def __setstate__(self, state) -> None:
        pass


def test_a_container_with_a_state_of_its_own_is_refused():
    with pytest.raises(papr_fx.TraceError, match="Odd .* return a plain dict, list or dataclass"):
        papr_fx.transform(Returns(lambda y, p: Odd(logits=y)).eval(), toy_proposal(), 0.5)


def test_attributes_and_factories_of_containers_are_kept():
    x = images(Shape(), 2, dtype=torch.float32)
    assert check_output(Returns(lambda y, p: noted(y)).eval())(x).note == "as made"
    assert check_output(Returns(lambda y, p: grouped(y)).eval())(x)["new"] == []


@pytest.mark.parametrize("answer", SHAPES.values(), ids=SHAPES.keys())
def test_outputs_without_a_batch_axis(answer):
    check_output(Returns(answer).eval())


def test_the_proof_compares_the_classes_of_outputs():
    y = torch.ones(2)
    with pytest.raises(papr_fx.VerifyError, match="tracing: .*dict.* where the model returns .*OrderedDict"):
        traced.compare({"a": y}, OrderedDict(a=y), "Toy")
