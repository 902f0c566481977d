"""A model is rewritten alike whatever surrounds the call: other threads, default types, contexts of the caller."""

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import timm
import torch
from torch import nn

import papr_fx
from papr_fx.tracing.numerics import exact_float32
from papr_fx.tracing.surroundings import SharedSetting, without_log

from ..models import Shape, ToyViT, toy_proposal

IMAGES = torch.randn(2, 3, 8, 12)


def small_convnext() -> nn.Module:
    return timm.create_model("convnext_atto", num_classes=2, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)).eval()


def test_threads_transform_and_serve_at_once():
    seconds, workers = 3.0, 6
    proposal = toy_proposal()
    expected = papr_fx.transform(ToyViT(Shape()).eval(), proposal, 0.5, verify=False)
    wanted, plain, x = expected(IMAGES), nn.Linear(2, 2), torch.ones(1, 2)
    linear = plain(x)
    end = time.monotonic() + seconds
    done = threading.Barrier(workers)

    def work(number: int) -> int:
        done.wait()
        count = 0
        while time.monotonic() < end:
            if number % 2:
                model = ToyViT(Shape()).eval()
                model.load_state_dict(expected.state_dict())
                gm = papr_fx.transform(model, proposal, 0.5, verify=number == 1)
                papr_fx.report(gm)
            else:
                gm = expected
            assert torch.equal(gm(IMAGES), wanted)
            assert torch.equal(plain(x), linear)
            count += 1
        return count

    call, getter = nn.Module.__call__, nn.Module.__getattr__
    with ThreadPoolExecutor(workers) as pool:
        counts = list(pool.map(work, range(workers)))
    assert min(counts) > 0
    assert (nn.Module.__call__, nn.Module.__getattr__) == (call, getter)
    assert nn.Linear(2, 2)(x).shape == (1, 2)


@contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def surrounded():
    """Each with a model of each kind; most of those by pixels, which take longest, in the slow sweep."""
    for name in SURROUNDINGS:
        yield pytest.param(name, lambda: ToyViT(Shape()).eval(), id=f"{name}-tokens")
        marks = () if name in ("bfloat16", "default device") else pytest.mark.slow
        yield pytest.param(name, small_convnext, id=f"{name}-pixels", marks=marks)


SURROUNDINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("name", "make"), [*surrounded()])
def test_the_rewrite_is_the_same_in_every_context(name, make):
    model, proposal = make(), toy_proposal()
    example = torch.zeros(1, 3, 8, 12) if isinstance(model, ToyViT) else torch.zeros(1, 3, 64, 64)
    plain = papr_fx.transform(model, proposal, 0.5, example_input=example)
    with SURROUNDINGS[name]():
        gm = papr_fx.transform(model, proposal, 0.5, example_input=example)
        found = papr_fx.report(gm)
    assert papr_fx.graph_diff(model, gm) == papr_fx.graph_diff(model, plain)
    assert found == papr_fx.report(plain)
    x = torch.randn(2, *example.shape[1:])
    assert torch.equal(gm(x), plain(x))
    gm(x).sum().backward()  # no tensor of the caller's inference mode
    assert not any(tensor.is_inference() for tensor in [*gm.parameters(), *gm.buffers()])


def test_a_shared_setting_ends_with_the_last_that_holds_it():
    state = ["off"]

    def apply():
        before, state[0] = state[0], "on"
        return lambda: state.__setitem__(0, before)

    setting = SharedSetting(apply)
    first, second = setting(), setting()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert state == ["on"]
    second.__exit__(None, None, None)
    assert state == ["off"]
    with pytest.raises(KeyError), setting():
        raise KeyError
    assert state == ["off"]


def test_precision_is_as_before():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with exact_float32():
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_only_this_thread_is_not_logged(caplog):
    log = logging.getLogger("papr_fx.test")
    with without_log("papr_fx.test"):
        log.warning("own")
        thread = threading.Thread(target=log.warning, args=("other",))
        thread.start()
        thread.join()
    log.warning("later")
    assert [record.message for record in caplog.records] == ["other", "later"]
