"""Caches beside the code of a model hold no fake tensors, whatever `transform` tried."""

import functools
import threading
from collections import defaultdict
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import papr_fx
from papr_fx.tracing.caches import remove_fakes
from papr_fx.tracing.numerics import relative_error
from papr_fx.versions import FakeTensor, FakeTensorMode

from ..models import Attention, Block, Shape, ToyViT, enliven, images, toy_proposal

TABLES: dict[int, Tensor] = {}
NESTED: dict[str, dict[int, tuple[Tensor]]] = defaultdict(dict)
LAST: list[Tensor] = []
MANY = {"": torch.zeros(0), **{str(number): torch.zeros(1) for number in range(100)}}


def made(n: int) -> Tensor:
    return torch.full((n, 1), 0.7)


def from_dictionary(n: int) -> Tensor:
    if n not in TABLES:
        TABLES[n] = made(n)
    return TABLES[n]


def from_nested(n: int) -> Tensor:
    if n not in NESTED["float"]:
        NESTED["float"][n] = (made(n),)
    return NESTED["float"][n][0]


def from_last(n: int) -> Tensor:
    if not LAST or len(LAST[0]) != n:
        LAST[:] = [made(n)]
    return LAST[0]


def from_many(n: int) -> Tensor:
    if f"table {n}" not in MANY:
        MANY[f"table {n}"] = made(n)
    return MANY[f"table {n}"]


from_lru = functools.lru_cache(made)


def from_default(n: int, known: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006
    if n not in known:
        known[n] = made(n)
    return known[n]


def remembering(function):
    known = {}

    def call(n):
        if n not in known:
            known[n] = function(n)
        return known[n]

    return call


from_closure = remembering(made)


class OfClass:
    tables: ClassVar[dict[int, Tensor]] = {}

    @classmethod
    def table(cls, n: int) -> Tensor:
        if n not in cls.tables:
            cls.tables[n] = made(n)
        return cls.tables[n]


class Store:
    def __init__(self) -> None:
        self.known = {}

    def table(self, n: int) -> Tensor:
        if n not in self.known:
            self.known[n] = made(n)
        return self.known[n]


STORE = Store()


WAYS = {
    "dictionary": from_dictionary,
    "nested": from_nested,
    "last": from_last,
    "many": from_many,
    "lru_cache": from_lru,
    "default": from_default,
    "closure": from_closure,
    "class": OfClass.table,
    "object": STORE.table,
}


class Faded(Attention):
    """Reads a tensor that is kept by the number of tokens."""

    def __init__(self, way: str) -> None:
        super().__init__(8, 2, True)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * WAYS[self.way](x.shape[1]).mean()


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_results_are_those_without_a_cache(way):
    model = ToyViT(Shape())
    model.blocks = nn.ModuleList(Block(8, Faded(way)) for _ in range(2))
    enliven(model).eval()
    x = images(Shape(), 2, dtype=torch.float32)
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    for z in (0.5, 0.3):
        papr_fx.set_keep_ratio(gm, z)
        assert papr_fx.report(gm).sites[0].kept == 1 + int(17 * z)
        output = gm(x)
        assert not isinstance(output, FakeTensor)
        ((_, mask),) = papr_fx.keep_masks(gm, x).items()
        rows = torch.cat([torch.ones(2, 1, dtype=torch.bool), mask.flatten(1)], dim=1)
        tokens = model.tokens(x)
        kept = torch.stack([sample[index] for sample, index in zip(tokens, rows, strict=True)])
        for block in model.blocks:
            kept = block(kept)
        assert relative_error(output, model.classify(kept)) < 1e-5


class OfThread(Attention):
    own = threading.local()

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        if not hasattr(self.own, f"table{n}"):
            setattr(self.own, f"table{n}", made(n))
        return super().forward(x) * getattr(self.own, f"table{n}").mean()


def test_a_cache_that_is_not_found_is_refused():
    model = ToyViT(Shape())
    model.blocks = nn.ModuleList(Block(8, OfThread(8, 2, True)) for _ in range(2))
    with pytest.raises(papr_fx.VerifyError, match=r"returns a tensor without content: .* keeps tensors between calls"):
        papr_fx.transform(enliven(model).eval(), toy_proposal(), 0.5, mode="tokens")


def test_other_entries_stay():
    TABLES.clear()
    mode = FakeTensorMode()
    with FakeTensorMode():
        others = torch.zeros(1)
    with mode:
        fake = torch.zeros(1)
    real = torch.zeros(1)
    TABLES.update({1: real, 2: fake, 3: others})
    LAST[:] = [real, fake, others]
    remove_fakes(Block(8, Faded("dictionary")), mode)
    assert list(TABLES) == [1, 3]
    assert [id(value) for value in LAST] == [id(real), id(others)]
    TABLES.clear()
    LAST.clear()
