"""`fully_shard` over a pruned module: forward, backward, modes and keep ratios are those of the whole module."""

import copy
import os
import subprocess
import sys

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import papr_fx

from ..models import Shape, ToyViT, enliven, toy_proposal

MODELS = {
    "tokens": (lambda: ToyViT(Shape()), (3, 8, 12)),
    "pixels": (lambda: timm.create_model("convnext_atto", num_classes=2, depths=(1,) * 4, dims=(8,) * 4), (3, 64, 64)),
}


def pruned(name: str) -> tuple[torch.fx.GraphModule, torch.Tensor]:
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model = enliven(build()).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = torch.randn(2, *shape)
    return papr_fx.transform(model, toy_proposal(), 0.5, example_input=x[:1], verify=False), x


def sharded(gm: torch.fx.GraphModule, blocks) -> torch.fx.GraphModule:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(gm, mesh=mesh)


def check_sharded(name: str) -> None:
    gm, x = pruned(name)
    whole = copy.deepcopy(gm)
    sharded(gm, gm.blocks if name == "tokens" else ())
    gm(x).square().mean().backward()
    whole(x).square().mean().backward()
    gradients = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    assert len(gradients) > 20
    for key, parameter in gm.named_parameters():
        assert (parameter.grad is None) == (key not in gradients)
        if key in gradients:
            torch.testing.assert_close(parameter.grad.full_tensor(), gradients[key], rtol=1e-4, atol=1e-5)
    for z, training in ((0.25, True), (1.0, True), (0.5, False), (0.25, True), (0.5, True)):
        for module in (gm, whole):
            papr_fx.set_keep_ratio(module, z)
            module.train(training)
        assert torch.equal(gm(x), whole(x))
    assert papr_fx.report(gm) == papr_fx.report(whole)
    gm.reshard()
    with pytest.raises(papr_fx.ArgumentError, match=r"call gm.unshard\(\) first"):
        papr_fx.keep_masks(gm, x)
    gm.unshard()
    for grid, mask in papr_fx.keep_masks(whole, x).items():
        assert torch.equal(papr_fx.keep_masks(gm, x)[grid], mask)


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", MODELS)
def test_a_sharded_module(name, process_group):
    check_sharded(name)


@pytest.mark.slow
def test_on_two_processes():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", __name__]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr


def test_a_class_above_that_of_the_code():
    """As a parametrisation of the module itself puts one there. `fx` would make calls of it call themselves."""
    gm, x = pruned("tokens")
    whole = copy.deepcopy(gm)
    gm.__class__ = type("Above", (type(gm),), {})
    for z in (0.25, 1.0, 0.25):
        papr_fx.set_keep_ratio(gm, z)
        papr_fx.set_keep_ratio(whole, z)
        assert torch.equal(gm(x), whole(x))
    gm.recompile()
    assert torch.equal(gm(x), whole(x))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for name in MODELS:
        check_sharded(name)
    dist.destroy_process_group()
