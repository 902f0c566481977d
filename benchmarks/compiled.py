"""ViTs, ConvNeXt and Swin dense and pruned, both compiled: GMACs and time. `python -m benchmarks.compiled`.

All forms of a model take turns in one run. The dense model of pixel operators is the faster one of two memory layouts.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from tabulate import tabulate
from torch import nn

import papr_fx

from .record import environment, write


class Subject(NamedTuple):
    """A keep ratio and a number of images."""

    z: float
    batch: int


MODELS = {
    "vit_small_patch16_224": Subject(0.5, 8),
    "vit_base_patch16_224": Subject(0.5, 8),
    "vit_large_patch16_224": Subject(0.5, 8),
    "swin_base_patch4_window7_224": Subject(0.65, 4),
    "convnext_base": Subject(0.65, 4),
}
PROPOSAL = "mobileone_s0"
Calls = Mapping[str, Callable[[], Any]]


def measure(name: str, subject: Subject, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """The row of one model."""
    model, images = timm.create_model(name).eval(), torch.randn(subject.batch, 3, 224, 224)
    gm = papr_fx.transform(model, timm.create_model(PROPOSAL), subject.z, verify=False)
    found = papr_fx.report(gm)
    torch.compiler.reset()
    modules = {"dense": (model, images), "pruned": (gm, images)}
    if found.mode == "pixels":
        last = torch.channels_last
        changed: nn.Module = copy.deepcopy(model).to(memory_format=last)  # pyright: ignore[reportCallIssue]
        modules["dense channels-last"] = changed, images.contiguous(memory_format=last)
    times = _medians({key: _call(torch.compile(module), given) for key, (module, given) in modules.items()}, rounds, clock)
    dense = min(value for key, value in times.items() if key.startswith("dense"))
    speed, macs = dense / times["pruned"], found.dense_macs / found.total_macs
    return {
        "model": name,
        "z": subject.z,
        "batch": subject.batch,
        "GMACs dense": found.dense_macs / 1e9,
        "with proposal": found.total_macs / 1e9,
        "ms dense": dense,
        "ms pruned": times["pruned"],
        "speed-up": speed,
        "MAC ratio": macs,
        "of it": speed / macs,
    }


def _call(run: Callable[..., Any], images: torch.Tensor) -> Callable[[], Any]:
    return lambda: run(images)


def _medians(calls: Calls, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median time of each in ms, after two untimed calls."""
    times: dict[str, list[float]] = {key: [] for key in calls}
    with torch.inference_mode():
        for _ in range(2 + rounds):
            for key, call in calls.items():
                start = clock()
                call()
                times[key].append((clock() - start) * 1e3)
    return {key: statistics.median(values[2:]) for key, values in times.items()}


def main() -> None:
    """Prints the table and writes out/compiled.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="of this thread, for a machine that others use too")
    parser.add_argument("--out", type=Path, default=Path("out/compiled.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    rows = [measure(name, MODELS[name], arguments.rounds, clock) for name in arguments.models]
    print(f"compiled, one thread, float32, proposal {PROPOSAL} included; {environment(0)}\n")
    formats = ("", "g", "", ".2f", ".2f", ".0f", ".0f", ".2f", ".2f", ".2f")
    print(tabulate(rows, headers="keys", floatfmt=formats, tablefmt="github"))
    write(arguments.out, rows, seed=0)


if __name__ == "__main__":
    main()
