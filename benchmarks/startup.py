"""What it takes until a pruned model serves: import, `transform`, first compiled call. `python -m benchmarks.startup`.

A proof is counted in forward passes of one image through the dense model. Compilations start with empty caches.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from tabulate import tabulate
from timm.data.config import resolve_model_data_config
from torch import nn
from torch._inductor.utils import fresh_cache

import papr_fx
from papr_fx.planning.module import PrunedModule
from papr_fx.proof.prove import prove

from .record import environment, write

MODELS = {
    "vit_base_patch16_224": 0.5,
    "vit_large_patch16_224": 0.5,
    "convnext_base": 0.65,
    "convnext_large": 0.65,
    "swin_base_patch4_window7_224": 0.65,
    "swin_large_patch4_window7_224": 0.65,
}
PROPOSAL = "mobileone_s0"


def seconds(call: Callable[[], Any]) -> float:
    """How long one call takes, in seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def import_seconds(module: str) -> float:
    """How long a new process takes to import a module, in seconds."""
    return seconds(lambda: subprocess.run([sys.executable, "-c", f"import {module}"], check=True))


@torch.no_grad()
def first_call(module: nn.Module, images: torch.Tensor) -> float:
    """Seconds that the first call of a compiled module takes, with empty caches."""
    torch.compiler.reset()
    with fresh_cache():
        return seconds(lambda: torch.compile(module)(images))


def measure(name: str, proposal: nn.Module, *, rounds: int, compiled: bool) -> dict[str, Any]:
    """Times one model. Medians of `rounds`, but for compilations."""
    model = timm.create_model(name).eval()
    images = torch.randn(1, *resolve_model_data_config(model)["input_size"])
    gm = papr_fx.transform(model, proposal, MODELS.get(name, 0.5), verify=False)
    plain, proof, forward = _medians(
        [
            lambda: papr_fx.transform(model, proposal, MODELS.get(name, 0.5), verify=False),
            lambda: prove(model, gm),
            lambda: _forward(model, images),
        ],
        rounds,
    )
    row = {"model": name, "transform": plain, "with proof": plain + proof, "forwards of a proof": proof / forward}
    return row | (_compilations(model, gm, images) if compiled else {})


@torch.no_grad()
def _forward(model: nn.Module, images: torch.Tensor) -> None:
    model(images)


def _medians(calls: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """The median time of each call, in seconds. They take turns."""
    times = [[seconds(call) for call in calls] for _ in range(rounds)]
    return [median(of_one) for of_one in zip(*times, strict=True)]


def _compilations(model: nn.Module, gm: PrunedModule, images: torch.Tensor) -> dict[str, float]:
    dense, pruned = first_call(model, images), first_call(gm, images)
    return {"first compiled call, dense": dense, "pruned": pruned, "ratio": pruned / dense}


def main() -> None:
    """Prints the table and writes out/startup.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", dest="compiled", action="store_false", help="leave the compiled calls out")
    parser.add_argument("--out", type=Path, default=Path("out/startup.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    proposal = timm.create_model(PROPOSAL).eval()
    imports = {name: median(import_seconds(name) for _ in range(arguments.rounds)) for name in ("timm", "papr_fx")}
    rows = [measure(name, proposal, rounds=arguments.rounds, compiled=arguments.compiled) for name in arguments.models]
    print(f"seconds; import timm {imports['timm']:.1f}, import papr_fx {imports['papr_fx']:.1f}; {environment(0)}\n")
    print(tabulate(rows, headers="keys", floatfmt=".1f", tablefmt="github"))
    write(arguments.out, rows, seed=0)


if __name__ == "__main__":
    main()
