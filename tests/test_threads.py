"""Threads that transform, serve, compile and copy models at once: each gets what it gets alone."""

import copy
import math
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from typing import ClassVar

import pytest
import timm
import torch
from torch import nn

import papr_fx
from papr_fx.planning.module import PrunedModule

from .models import Shape, ToyViT, enliven, toy_proposal
from .models.positioned import positioned

MODELS = {
    "ViT": (lambda: ToyViT(Shape()), (3, 8, 12)),
    "rotary ViT": (lambda: positioned(Shape(), "rotary"), (3, 8, 12)),
    "ConvNeXt": (lambda: timm.create_model("convnext_atto", num_classes=2, depths=(1,) * 4, dims=(8,) * 4), (3, 64, 64)),
    "Swin": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=64, embed_dim=8, depths=(1, 2), num_heads=(2, 4), num_classes=2
        ),
        (3, 64, 64),
    ),
}


class Alone:
    """A model, its pruned module, and what they return where no other thread runs."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        build, shape = MODELS[name]
        self.name, self.model, self.x = name, enliven(build()).eval(), torch.randn(2, *shape)
        self.proposal = toy_proposal()
        self.gm = self.transformed()
        with torch.no_grad():
            self.dense, self.pruned = self.model(self.x), self.gm(self.x)
        self.differentiable = self.gm(self.x).detach()  # fused attention takes another kernel then, which rounds otherwise
        self.text = papr_fx.graph_diff(self.model, self.gm)

    def transformed(self) -> torch.fx.GraphModule:
        return papr_fx.transform(self.model, self.proposal, 0.5, example_input=self.x[:1], verify=False)


class Recompiled:
    """A backend that counts how often it is asked."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, gm, inputs):
        self.count += 1
        return gm.forward


@torch.no_grad()
def transforms(case: Alone) -> None:
    gm = case.transformed()
    assert papr_fx.graph_diff(case.model, gm) == case.text
    assert torch.equal(gm(case.x), case.pruned)
    papr_fx.set_keep_ratio(gm, 1.0)
    assert torch.equal(gm(case.x), case.dense)


@torch.no_grad()
def serves(case: Alone) -> None:
    for _ in range(20):
        assert torch.equal(case.gm(case.x), case.pruned)
        assert torch.equal(case.model(case.x), case.dense)


@torch.no_grad()
def compiles(case: Alone) -> None:
    torch.compiler.reset()
    for module, wanted in ((case.gm, case.pruned), (case.model, case.dense)):
        backend = Recompiled()
        compiled = torch.compile(copy.deepcopy(module), backend=backend, fullgraph=True)
        for _ in range(20):
            assert torch.equal(compiled(case.x), wanted)
        assert backend.count == 1


def copies(case: Alone) -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert copy.deepcopy(case.gm)(case.x).is_inference()
    copied = copy.deepcopy(case.gm)
    out = copied(case.x)
    out.sum().backward()
    assert out.dtype == torch.float32
    assert torch.equal(out, case.differentiable)


@cache
def alone(name: str) -> Alone:
    return Alone(name)


def run(seconds: float, names: list[str], works: list) -> list[int]:
    """Runs each work in a thread of its own, on the models in turn. How often each was done."""
    cases = [alone(name) for name in names]
    started = threading.Barrier(len(works))
    stop = threading.Event()

    def repeat(number: int) -> int:
        started.wait()
        end, count = time.monotonic() + seconds, 0
        while not count or (time.monotonic() < end and not stop.is_set()):
            with ExitStack() as failing:
                failing.callback(stop.set)  # unless the work is done
                works[number](cases[(number + count) % len(cases)])
                failing.pop_all()
            count += 1
        return count

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(repeat, range(len(works))))


QUICK = (1, ["ViT", "ConvNeXt"], [transforms, transforms, serves, compiles, copies])
LONG = (60, list(MODELS), [transforms, transforms, transforms, transforms, serves, serves, compiles, copies])


@pytest.mark.parametrize(
    ("seconds", "names", "works"),
    [
        pytest.param(*QUICK, id="quick"),
        pytest.param(*LONG, id="long", marks=pytest.mark.slow),
    ],
)
def test_no_thread_notices_the_others(seconds, names, works):
    """None exports: while PyTorch does, modules in other threads return something else, pruned or not."""
    patched = nn.Module.__call__, nn.Module.__getattr__, torch.arange, math.sqrt
    assert min(run(seconds, names, works)) > 0
    assert (nn.Module.__call__, nn.Module.__getattr__, torch.arange, math.sqrt) == patched
    assert nn.Linear(2, 2)(torch.ones(1, 2)).shape == (1, 2)


def patchable() -> tuple[object, ...]:
    """What torch.fx patches while it traces."""
    return nn.Module.__call__, nn.Module.__getattr__, torch.arange, math.sqrt, vars(sys.modules[__name__]).get("int"), hidden


@torch.fx.wrap
def hidden(x):
    return x


class Watched(ToyViT):
    """Looks, while its code runs, at what other threads see."""

    look: ClassVar = [patchable]  # in a list, where the trace does not make it again
    seen: ClassVar[list[object]] = []

    def tokens(self, x):
        tokens = super().tokens(x)
        looked = threading.Thread(target=lambda: self.seen.append(self.look[0]()))
        looked.start()
        looked.join()
        return tokens + torch.arange(int(tokens.shape[1]), device=x.device).to(tokens.dtype)[:, None] / math.sqrt(
            tokens.shape[2]
        )


@torch.no_grad()
def test_other_threads_see_nothing_of_a_trace():
    model, x = enliven(Watched(Shape())).eval(), torch.randn(2, 3, 8, 12)
    expected = patchable()
    gm = papr_fx.transform(model, toy_proposal(), 1.0, verify=False)
    assert "arange" in gm.code
    assert "sqrt" in gm.code
    assert torch.equal(gm(x), model(x))
    assert len(Watched.seen) > 2
    assert set(Watched.seen) == {expected}


def retargets(gm):
    papr_fx.set_keep_ratio(gm, 0.7)


def switches(gm):
    gm.train().eval()


@torch.no_grad()
@pytest.mark.parametrize(("name", "other"), [("ViT", retargets), ("ConvNeXt", switches)])
def test_changes_of_one_module_take_turns(name, other, monkeypatch):
    """One thread changes the keep ratio, and has put the new code in place; then another does something."""
    case = alone(name)
    answers = {0.5: case.pruned}
    for z in (0.3, 0.7):
        gm = case.transformed()
        papr_fx.set_keep_ratio(gm, z)
        answers[z] = gm(case.x)
    gm, inside, done = case.transformed(), threading.Event(), threading.Event()
    recompile = PrunedModule.recompile

    def paused(module):
        code = recompile(module)
        if module is gm and not inside.is_set():
            inside.set()
            done.wait(0.5)  # in vain, where the other has to wait
        return code

    def second():
        inside.wait()
        other(gm)
        done.set()

    monkeypatch.setattr(PrunedModule, "recompile", paused)
    with ThreadPoolExecutor(2) as pool:
        for future in (pool.submit(papr_fx.set_keep_ratio, gm, 0.3), pool.submit(second)):
            future.result()
    assert torch.equal(gm(case.x), answers[gm.plan.z])
    papr_fx.set_keep_ratio(gm, 0.3)
    assert torch.equal(gm(case.x), answers[0.3])
