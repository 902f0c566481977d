"""Scratch copies on fake tensors: their parameters are fake for a while, and the real ones again afterwards."""

import copy
import threading
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from papr_fx.tracing.fakes import fake_like, faking, scratch_copy
from papr_fx.tracing.results import shared_results


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def test_parameters_are_fake_in_the_body_alone():
    model = tied()
    root = scratch_copy(model)
    mode, fake = fake_like(torch.zeros(1, 4), 2)
    with faking(mode, root):
        assert all(type(parameter) is FakeTensor for parameter in root.parameters())
        assert root[1].weight is root[0].weight
        root[0].weight.mul_(2)
        assert root(fake).shape == (2, 4)
    assert list(map(id, root.parameters())) == list(map(id, model.parameters()))
    assert root[1].weight is root[0].weight
    assert torch.equal(root(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_parameters_come_back_after_an_error():
    root = scratch_copy(tied())
    mode, fake = fake_like(torch.zeros(1, 4), 2)
    with pytest.raises(RuntimeError), faking(mode, root):
        root(fake[:, :3])
    assert all(type(parameter) is nn.Parameter for parameter in root.parameters())


class Owner(nn.Module):
    """Copies itself without the part that holds a lock."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.part = nn.Identity()
        self.part.lock = threading.Lock()

    def __deepcopy__(self, memo):
        copied = nn.Sequential()
        memo[id(self)] = copied
        copied.append(copy.deepcopy(self.layer, memo))
        return copied


class Reading(nn.Module):
    """Reads its child as soon as it has its state."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def __setstate__(self, state):
        super().__setstate__(state)
        self.features = self.child.weight.shape[0]


class Listed(nn.Module, dict):
    __hash__ = nn.Module.__hash__


def test_modules_that_copy_themselves():
    assert len(list(scratch_copy(nn.Sequential(nn.ReLU(), Owner())).modules())) == 4
    shared = nn.Linear(4, 4)
    copied = scratch_copy(nn.Sequential(nn.Sequential(shared), nn.Sequential(Reading(shared))))
    assert copied[1][0].features == 4
    assert copied[1][0].child is copied[0][0] is not shared
    assert type(scratch_copy(nn.Sequential(Listed()))[0]) is Listed


def test_copies_share_parameters_and_keep_the_rest_apart():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[1].notes = {"of": [model[0]]}
    copied = scratch_copy(model)
    assert copied[1].weight is model[1].weight
    assert copied[0].running_mean is not model[0].running_mean
    assert torch.equal(copied[0].running_mean, model[0].running_mean)
    assert copied[1].notes["of"][0] is copied[0] is not model[0]
    assert copied.train()[0].training is not model.eval()[0].training


@pytest.mark.parametrize("kind", [dict, OrderedDict, list, set])
def test_empty_containers_stay_shared_and_apart(kind):
    model = nn.Sequential(nn.ReLU(), nn.ReLU())
    model[0].own, model[0].seen = kind(), kind()
    model[1].seen = model[0].seen
    copied = scratch_copy(model)
    assert type(copied[0].seen) is kind
    assert copied[0].seen is copied[1].seen is not model[0].seen
    assert copied[0].own is not copied[0].seen


def test_empty_containers_keep_what_is_noted_on_them():
    model = nn.Identity()
    model.seen = OrderedDict()
    model.seen.note = [1]
    copied = scratch_copy(model)
    assert copied.seen.note == [1]
    assert copied.seen.note is not model.seen.note


def test_runs_that_share_results_share_fake_parameters():
    model = tied()
    seen = []
    with shared_results():
        for root in (scratch_copy(model), scratch_copy(model)):
            mode, _ = fake_like(torch.zeros(1, 4), 2)
            with faking(mode, root):
                seen.append([id(parameter) for parameter in root.parameters()])
    assert seen[0] == seen[1]
    with faking(fake_like(torch.zeros(1, 4), 2)[0], root):
        assert not {id(parameter) for parameter in root.parameters()} & {*seen[0]}
