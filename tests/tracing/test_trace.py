"""Tracing runs the model, but leaves its buffers, hooks and caches unchanged, and torch.fx too."""

import functools
import threading

import pytest
import torch
from torch import Tensor, nn

import papr_fx

from ..models import Shape, ToyViT, images, toy_proposal
from ..models.vits import BatchNormStem, SinCos


@pytest.mark.parametrize("training", [False, True])
def test_buffers_of_the_model_stay_as_they_are(training):
    model = BatchNormStem().train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    papr_fx.report(gm)
    papr_fx.graph_diff(model, gm)
    papr_fx.set_keep_ratio(gm, 0.25)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    gm.train()(torch.randn(4, 3, 8, 12))
    assert int(model.stem.num_batches_tracked) == 1  # shared, like all tensors


def test_tracing_leaves_torch_fx_as_it_was():
    papr_fx.transform(SinCos(), toy_proposal(), 0.5)
    assert torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))(torch.zeros(1, 2)).shape == (1, 2)


def test_hooks_on_blocks_see_no_fake_tensors():
    model = ToyViT(Shape())
    seen: list[type] = []
    model.blocks[0].register_forward_hook(lambda _m, _i, out: seen.append(type(out)))
    papr_fx.transform(model, toy_proposal(), 0.5)
    assert set(seen) <= {Tensor}


class TablePatches(nn.Conv2d):
    """A patch embedding whose position table is cached by functools, outside any module."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + table(x.shape[-1])


class CachedTable(ToyViT):
    def __init__(self) -> None:
        super().__init__(Shape())
        self.proj = TablePatches(3, 8, self.shape.patch, self.shape.patch)


@functools.lru_cache
def table(count: int) -> Tensor:
    return torch.linspace(-1, 1, count)


@pytest.mark.parametrize("verify", [False, True])
def test_caches_outside_modules_hold_real_tensors(verify):
    table.cache_clear()
    model = CachedTable().eval()
    gm = papr_fx.transform(model, toy_proposal(), 1.0, verify=verify)
    x = torch.randn(2, 3, 8, 12)
    assert type(model(x)) is Tensor
    assert torch.equal(gm(x), model(x))


def test_tensors_that_a_module_computed_and_stored():
    model = ToyViT(Shape())
    nn.utils.parametrizations.weight_norm(model.head)
    model.last = model(torch.randn(1, 3, 8, 12))
    assert papr_fx.transform(model, toy_proposal(), 0.5)(torch.randn(2, 3, 8, 12)).shape == (2, 7)


class Doubled(ToyViT):
    """Scales its tokens by a constant that differs in training; with `more`, it has a constant only in training."""

    def __init__(self, *, more: bool) -> None:
        super().__init__(Shape())
        self.more = more

    def tokens(self, x):
        x = super().tokens(x)
        if self.more:
            return x * torch.tensor([2.0] * 8) if self.training else x
        return x * (torch.tensor(2.0) if self.training else torch.tensor(1.0))


@pytest.mark.parametrize("more", [False, True])
def test_constants_of_training(more):
    model = Doubled(more=more).eval()
    for block in model.blocks:
        block.mlp[2].p = 0.0
    gm = papr_fx.transform(model, toy_proposal(), 1.0)
    x = images(Shape(), 2, dtype=torch.float32)
    assert torch.equal(gm(x), model(x))
    gm.train()
    assert torch.equal(gm(x), model.train()(x))


class Noisy(ToyViT):
    def tokens(self, x):
        return super().tokens(x) + (torch.randn(8) if self.training else torch.zeros(8))


def test_random_numbers_of_a_fixed_size_are_refused():
    with pytest.raises(papr_fx.TraceError, match="draws random numbers of a fixed size in training"):
        papr_fx.transform(Noisy(Shape()), toy_proposal(), 0.5)


class AsksFor17(ToyViT):
    """A branch that Python takes by `in`: with fewer tokens it would take the other."""

    def __init__(self) -> None:
        super().__init__(Shape())

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).sum(1) / (17 if 17 in x.shape else 9))


@pytest.mark.parametrize("verify", [True, False])
def test_membership_in_a_shape_is_a_read(verify):
    with pytest.raises(papr_fx.NoSiteError, match="as a Python number or length"):
        papr_fx.transform(AsksFor17(), toy_proposal(), 0.5, verify=verify)


class DrawsFixed(ToyViT):
    def tokens(self, x: Tensor) -> Tensor:
        return super().tokens(x) + torch.rand(8)


class DrawsElsewhere(ToyViT):
    """Another thread draws random numbers while this model is traced."""

    def tokens(self, x: Tensor) -> Tensor:
        thread = threading.Thread(target=torch.rand, args=(8,))
        thread.start()
        thread.join()
        return super().tokens(x)


def test_draws_of_a_fixed_size_are_refused_but_only_those_of_this_thread():
    with pytest.raises(papr_fx.TraceError, match="draws random numbers of a fixed size"):
        papr_fx.transform(DrawsFixed(Shape()), toy_proposal(), 0.5)
    papr_fx.transform(DrawsElsewhere(Shape()), toy_proposal(), 0.5)
