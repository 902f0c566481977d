"""What models become on a CUDA GPU, lowered without one: one CUDA graph, no wait, no copy, few kernels.

PyTorch is patched for it, so the lowering runs in a process of its own (this file as a program), once for all tests.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from filelock import FileLock
from torch import nn

import papr_fx
from benchmarks.cuda_lowering import LIBRARY_CALLS, faults, kernel_limit
from benchmarks.fake_cuda import GPUS
from benchmarks.lowering import Target, lower

from ..models import toy_proposal


def separable_proposal():
    depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False)
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), depthwise, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))


SHAPE = (4, 3, 64, 64)
MODELS = {
    "ViT": lambda: timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64),
    "ConvNeXt": lambda: timm.create_model("convnext_tiny", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)),
    "Swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, embed_dim=32, depths=(1, 2), num_heads=(2, 4)
    ),
}
PROPOSALS = {"ViT": toy_proposal, "ConvNeXt": toy_proposal, "Swin": separable_proposal}
GRIDS = {"ViT": 1, "ConvNeXt": 4, "Swin": 2}
SLOW = ("ConvNeXt", "Swin")
EACH = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS]


class MaskIndexing(nn.Module):
    def forward(self, x):
        return x[x > 0].sum()


class Item(nn.Module):
    def forward(self, x):
        return x * (x > 0).sum().item()


class DependentCount(nn.Module):
    def forward(self, x):
        k = int((x > 0).sum() * 3 + 2)
        return x.flatten(1).topk(k).values


class Branch(nn.Module):
    def forward(self, x):
        return x.relu() if x.mean() > 0 else x.tanh()


class ConstantMoved(nn.Module):
    def forward(self, x):
        return x * torch.tensor([0.5, 1.0, 2.0], dtype=x.dtype).to(x.device).view(1, 3, 1, 1)


class BFloat16Scatter(nn.Module):
    def forward(self, x):
        return x.index_add(0, torch.zeros(x.shape[0], dtype=torch.int64, device=x.device), x)


# What is wrong on purpose, and the check that has to say so.
CONTROLS = {
    "MaskIndexing": (MaskIndexing, "sync: aten.index.Tensor"),
    "Item": (Item, "sync: aten._local_scalar_dense.default"),
    "DependentCount": (DependentCount, "cut: cpu ops"),
    "Branch": (Branch, "break: "),
    "ConstantMoved": (ConstantMoved, "copy: prims.device_put.default from cpu to cuda"),
    "BFloat16Scatter": (BFloat16Scatter, "library call: index_add"),
}


def describe(lowering):
    return {
        "graphs": lowering.graphs,
        "calls": lowering.calls,
        "count": lowering.count,
        "bytes": lowering.bytes,
        "ms": lowering.ms,
        "faults": faults(lowering),
        "launched": [name for code in lowering.code for name in re.findall(r"\b(triton_\w+)\.run\(", code)],
        "kernels": [vars(kernel) for kernel in lowering.kernels],
    }


def lower_all(path: Path, *, slow: bool) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found = {}

    def lowered(module, *, compile_kernels=False):
        return lower(module, SHAPE, Target(GPUS[90], torch.bfloat16, compile_kernels=compile_kernels))

    for name, build in MODELS.items():
        if name in SLOW and not slow:
            continue
        model = build().eval()
        gm = papr_fx.transform(model, PROPOSALS[name](), 0.5, example_input=torch.zeros(1, *SHAPE[1:]), verify=False)
        dense, proposal = lowered(model), lowered(gm.papr_proposal)
        pruned = lowered(gm, compile_kernels=name == "ViT")
        parts = {"dense": dense, "proposal": proposal, "pruned": pruned}
        found[name] = {part: describe(value) for part, value in parts.items()}
        found[name] |= {"limit": kernel_limit(dense, proposal, gm), "device": gm.example().device.type}
    merged = papr_fx.transform(
        MODELS["ViT"]().eval(),
        toy_proposal(),
        0.8,
        example_input=torch.zeros(1, *SHAPE[1:]),
        verify=False,
        merge=papr_fx.Merge(2, "all"),
    )
    found["merged"] = describe(lowered(merged))
    for name, (build, _) in CONTROLS.items():
        found[name] = describe(lowered(build()))
    found["cuda afterwards"] = torch.cuda.is_available()
    path.write_text(json.dumps(found))


@pytest.fixture(scope="session")
def found(tmp_path_factory, pytestconfig):
    """What `lower_all` found. Workers of one run share it, by a file."""
    folder = tmp_path_factory.getbasetemp()
    path = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cuda_lowering.json"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            command = [sys.executable, "-W", "error", "-m", "tests.benchmarks.test_cuda_lowering", str(path)]
            command += ["--all"] if pytestconfig.getoption("all") else []
            environment = os.environ | {"TMPDIR": str(path.parent), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", EACH)
def test_a_pruned_model_is_one_cuda_graph(found, name):
    pruned, dense = (found[name][part] for part in ("pruned", "dense"))
    assert pruned["faults"] == []
    assert pruned["graphs"] == 1
    assert pruned["calls"].keys() <= LIBRARY_CALLS | dense["calls"].keys()
    assert pruned["calls"]["topk"] == 2 * GRIDS[name]  # the choice is in it, once a grid, and its order
    assert not [kernel for kernel in pruned["kernels"] if "sort" in kernel["name"]]  # those take minutes to compile
    assert found[name]["device"] == "cpu"  # the model given was copied


@pytest.mark.parametrize("name", EACH)
def test_pruning_adds_few_kernels(found, name):
    pruned, dense, proposal = (found[name][part]["count"] for part in ("pruned", "dense", "proposal"))
    assert dense + GRIDS[name] < pruned <= found[name]["limit"] < 2 * dense + 30
    assert proposal >= 2


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("part", ["dense", "proposal", "pruned"])
def test_bytes_and_time_are_those_of_an_h100(found, name, part):
    lowered = found[name][part]
    assert lowered["bytes"] > 4 * 3 * 64 * 64 * 2  # the images are read
    assert lowered["ms"] >= lowered["bytes"] / 3.4e9  # 3.35 TB/s
    assert lowered["ms"] < lowered["bytes"] / 1e9


@pytest.mark.slow
def test_a_depthwise_convolution_joins_the_kernels_around_it(found):
    proposal = found["Swin"]["proposal"]
    assert proposal["calls"] == {"convolution": 2}  # the pointwise ones
    assert proposal["count"] <= 5  # layout, two convolutions, what lies between them, the mean


def test_attention_is_one_call(found):
    for part in ("dense", "pruned"):
        assert found["ViT"][part]["calls"]["_scaled_dot_product_flash_attention"] == 2


def test_merging_is_one_cuda_graph_and_its_attention_one_call(found):
    merged = found["merged"]
    assert merged["faults"] == []
    assert merged["graphs"] == 1
    assert merged["calls"]["_scaled_dot_product_flash_attention"] == 1  # before the first merge, where all sizes are 1
    assert merged["calls"]["_scaled_dot_product_efficient_attention"] == 1
    assert merged["calls"].get("bmm", 0) == 4  # of keys, and of what is merged


def test_every_kernel_becomes_machine_code(found):
    pruned = found["ViT"]["pruned"]
    assert pruned["launched"]
    assert {kernel["name"] for kernel in pruned["kernels"]} == set(pruned["launched"])
    for kernel in pruned["kernels"]:
        assert (kernel["target"], kernel["atomic"]) == ("sm_90", False)
        assert kernel["code_bytes"] > 1000


@pytest.mark.parametrize("name", CONTROLS)
def test_what_breaks_a_cuda_graph_is_found(found, name):
    assert any(fault.startswith(CONTROLS[name][1]) for fault in found[name]["faults"]), found[name]["faults"]


def test_the_gpu_is_gone_afterwards(found):
    assert found["cuda afterwards"] == torch.cuda.is_available()


def test_a_kernel_of_another_library_and_a_second_graph_are_faults():
    lowering = SimpleNamespace(graphs=2, breaks=[], cuts=["cpu ops (op1)"], syncs=[], copies=[], calls={"mm": 1, "sort": 1})
    assert faults(lowering) == ["graphs: 2 instead of 1", "cut: cpu ops (op1)", "library call: sort"]
    assert faults(lowering, {"mm", "sort"})[2:] == []


if __name__ == "__main__":
    lower_all(Path(sys.argv[1]), slow="--all" in sys.argv)
