"""Scratch copies on fake tensors: their parameters are fake for a while, and the real ones again afterwards."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from papr_fx.tracing.fakes import fake_like, faking, scratch_copy


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
