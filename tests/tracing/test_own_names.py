"""A model's code runs over names of its own while it is traced, wherever that code is written."""

import functools
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import papr_fx
from papr_fx.tracing.opened_modules import opened_modules
from papr_fx.tracing.own_names import OwnNames
from papr_fx.tracing.trace import trace

from ..models import Shape, ToyViT, enliven, toy_proposal

CALLS: list[str] = []


def ramp(x: Tensor) -> Tensor:
    return torch.arange(int(x.shape[0] / 1), device=x.device).to(x.dtype)[:, None, None]


def decorated(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        CALLS.append(function.__name__)
        return function(*args, **kwargs)

    return call


@decorated
def decorated_ramp(x):
    return ramp(x)


def recursive_ramp(x, depth=2):
    return recursive_ramp(x, depth - 1) if depth else ramp(x)


@functools.lru_cache
def cached_ramp(count):
    return torch.arange(count)


class Base(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ramp(x)


class Derived(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super(Derived, self).forward(x)  # noqa: UP008


class Static(nn.Module):
    @staticmethod
    def ramp(x: Tensor) -> Tensor:
        return torch.arange(int(x.shape[0])).to(x.dtype)[:, None, None]

    @classmethod
    def twice(cls, x: Tensor) -> Tensor:
        return ramp(x) + ramp(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.ramp(x) + self.twice(x)


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ramp = ramp

    def forward(self, x: Tensor) -> Tensor:
        return self.ramp(x)


class Importing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        import torch as library
        from torch import arange

        from . import test_own_names as here

        many = library.arange(x.shape[0]) + arange(x.shape[0])
        return many.to(x.dtype)[:, None, None] + here.recursive_ramp(x)


class Nested(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        def inner(y: Tensor) -> Tensor:
            return torch.arange(int(y.shape[0])).to(y.dtype)[:, None, None]

        return sum(f(x) for f in (inner, lambda y: ramp(y))) / math.sqrt(x.shape[0])


class Cached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return cached_ramp(x.shape[0]).to(x.dtype)[:, None, None] + decorated_ramp(x)


class Asking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        known = isinstance(3, int) and isinstance(3.0, (int, float)) and issubclass(bool, int) and int("7") == 7
        return ramp(x) if known and isinstance(torch, type(math)) else x


class Counting(nn.Module):
    """Takes the length of tensors, and of what is none."""

    def forward(self, x: Tensor) -> Tensor:
        known = len([x, x]) == 2 and len(x.shape) == 3 and list(map(len, ("a", "bc"))) == [1, 2]
        return (ramp(x) + torch.arange(len(x))[:, None, None]).expand(len(x), len(x[0]), -1) if known else x


class Looking(nn.Module):
    """Reads globals by name, in the body of a class, and through a partial; passes types for dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.ramp = functools.partial(recursive_ramp, depth=1)

    def forward(self, x: Tensor) -> Tensor:
        class Here:
            found = ramp

        assert "ramp" in globals()
        assert globals().get("nothing") is None
        missing = globals().get("ramp", lambda x: x)
        ones = torch.ones(1, dtype=float) * (x == x).to(int)[:, :1, :1]
        return (Here.found(x) + missing(x) + self.ramp(x) + ones.to(float)).to(x.dtype)


class Model(ToyViT):
    """Adds a value by image in front of its tokens' blocks, made by a part of its own."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__(Shape())
        self.part = part

    def tokens(self, x: Tensor) -> Tensor:
        return super().tokens(x) + 0.1 * self.part(x.flatten(1)[:, None])


@pytest.mark.parametrize("kind", [Derived, Static, Held, Importing, Nested, Cached, Asking, Counting, Looking])
@torch.no_grad()
def test_code_follows_the_batch_wherever_it_is(kind):
    """Where a name were left out, the batch size would be a constant."""
    model = enliven(Model(kind())).eval()
    traced = trace(model, torch.zeros(1, 3, 8, 12), lambda module, name: True)
    assert not traced.graph.find_nodes(op="call_module", target="part")
    gm = traced.module(model)
    for batch in (1, 3, 5):
        x = torch.randn(batch, 3, 8, 12)
        assert torch.equal(gm(x), model(x))


class Prompted(ToyViT):
    """Asks for the batch size, and for the number of tokens of an image, by `len`."""

    def tokens(self, x: Tensor) -> Tensor:
        tokens = super().tokens(x)
        return tokens + 0.1 * torch.ones_like(tokens[0]).mean() * torch.ones(len(tokens), len(tokens[0]), 1)


def test_a_model_that_takes_the_length_of_tensors_is_pruned():
    model = enliven(Prompted(Shape(prefix=1, pool="cls"))).double().eval()
    papr_fx.testing.check(model, toy_proposal().double(), 0.5, example_input=torch.zeros(1, 3, 8, 12, dtype=torch.float64))


class Warns(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("of the model", UserWarning, stacklevel=1)
        return x.sum((1, 2), keepdim=True)


def test_a_warning_names_its_module():
    model = enliven(Model(Warns())).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"tests\.tracing\.test_own_names")
        papr_fx.transform(model, toy_proposal(), 0.5, verify=False)


class Changing(nn.Module):
    """Makes a part at its first call, and drops another."""

    def __init__(self) -> None:
        super().__init__()
        self.old = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "old"):
            del self.old
            self.new = nn.Identity()
        return self.new(x.sum((1, 2), keepdim=True))


def test_a_model_may_change_its_parts():
    model = enliven(Model(Changing())).eval()
    traced = trace(model, torch.zeros(1, 3, 8, 12), lambda module, name: True)
    x = torch.randn(2, 3, 8, 12)
    assert hasattr(model.part, "old")
    assert torch.equal(traced.module(model)(x), model(x))


def test_modules_are_closed_again():
    root = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = [dict(vars(module)) for module in root.modules()]
    seen = []

    def read(name, tensor):
        seen.append(name)
        return tensor

    own = OwnNames(lambda names, name, value: value, {})
    with opened_modules(root, lambda module, args, kwargs: "called", read, own):
        assert root[0](torch.ones(1, 2)) == "called"
        assert root[1].running_mean.shape == root[0].weight.shape[:1]
        root[1].register_buffer("cache", torch.ones(1))
    assert seen == ["running_mean", "weight"]
    assert root[1].cache.item() == 1
    del root[1].cache
    assert [dict(vars(module)) for module in root.modules()] == before
    assert root(torch.ones(2, 2)).shape == (2, 2)
