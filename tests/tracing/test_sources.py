"""The text of generated code stays as long as the code, and no longer."""

import copy
import gc
import linecache
from pathlib import Path

import pytest
import torch
from torch import fx

import papr_fx
from papr_fx.tracing.sources import GraphModule

from ..models import Shape, ToyViT, enliven, toy_proposal


def texts() -> tuple[int, int]:
    gc.collect()
    gc.collect()
    return len(fx.graph_module._loader.eval_cache), sum(name.startswith("<eval_with_key>") for name in linecache.cache)


def transformed(model):
    return papr_fx.transform(model, toy_proposal(), 0.5)


def retargeted(gm):
    for z in (0.7, 1.0, 0.5, 0.3):
        papr_fx.set_keep_ratio(gm, z)
    return gm.train().eval()


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "work", [transformed, lambda model: retargeted(transformed(model)), lambda model: copy.deepcopy(transformed(model))]
)
def test_nothing_stays_of_what_is_gone(work):
    model = enliven(ToyViT(Shape())).eval()
    before = texts()
    gm = work(model)
    assert texts() > before
    del gm
    assert texts() == before


def test_code_that_can_run_has_its_text():
    gm = papr_fx.transform(enliven(ToyViT(Shape())).eval(), toy_proposal(), 0.5, verify=False)
    files = []
    for z in (0.5, 0.3, 0.5):
        papr_fx.set_keep_ratio(gm, z)
        files.append(gm._written.__code__.co_filename)
        assert "".join(linecache.getlines(files[-1])).strip() == gm.code.strip()
    assert files[0] == files[2] != files[1]


def test_a_text_that_other_code_shares_stays():
    graph = fx.symbolic_trace(torch.nn.ReLU()).graph
    with torch.fx.experimental._config.patch(enrich_profiler_metadata=True):
        first, second = (GraphModule(torch.nn.Module(), copy.deepcopy(graph)) for _ in range(2))
    file = second.forward.__func__.__code__.co_filename
    assert file == first.forward.__func__.__code__.co_filename
    del first
    gc.collect()
    assert file in fx.graph_module._loader.eval_cache


def test_all_graph_modules_are_of_this_kind():
    """Others would leave their texts."""
    root = Path(papr_fx.__file__).parent
    files = [*root.glob("*.py"), *root.glob("*/*.py")]
    assert len(files) > 100
    assert [file.name for file in files if "fx.GraphModule(" in file.read_text()] == []
