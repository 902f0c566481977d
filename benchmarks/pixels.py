"""ConvNeXt and Swin dense and pruned, eager and compiled: GMACs, time, peak memory. `python -m benchmarks.pixels`."""

import argparse
import copy
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from tabulate import tabulate
from torch import nn

import papr_fx
from papr_fx.evaluation.timing import median_times

from .record import environment, peak_megabytes, write

MODELS = (
    "convnext_tiny",
    "convnext_base",
    "swin_tiny_patch4_window7_224",
    "swin_base_patch4_window7_224",
    "torchvision/convnext_tiny",
    "torchvision/convnext_base",
    "torchvision/swin_t",
    "torchvision/swin_b",
)
PROPOSAL = "mobileone_s0"


def create(name: str) -> nn.Module:
    """A timm model, or a torchvision model if the name starts with "torchvision/", with random weights."""
    library, _, short = name.rpartition("/")
    return (torchvision.models.get_model(short) if library else timm.create_model(name)).eval()


def measure(name: str, ratios: list[float], batch: int, rounds: int, *, compiled: bool) -> list[dict[str, Any]]:
    """One row for each keep ratio; the dense model in both memory layouts and all pruned forms take turns in one run."""
    model = create(name)
    images = torch.randn(batch, 3, 224, 224)
    last = images.contiguous(memory_format=torch.channels_last)
    pruned = {
        z: papr_fx.transform(model, timm.create_model(PROPOSAL), z, example_input=images[:1], mode="pixels", verify=False)
        for z in ratios
    }
    dense_last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    reports = {z: papr_fx.report(gm) for z, gm in pruned.items()}
    torch.compiler.reset()

    def run(module: nn.Module) -> Any:
        return torch.compile(module) if compiled else module

    variants = {"dense": (run(model), images), "dense channels-last": (run(dense_last), last)}
    variants |= {str(z): (run(gm), images) for z, gm in pruned.items()}
    times = median_times({key: lambda pair=pair: pair[0](pair[1]) for key, pair in variants.items()}, rounds=rounds)
    memory = {key: 0.0 if compiled else peak_megabytes(lambda pair=pair: pair[0](pair[1])) for key, pair in variants.items()}
    dense = min(times["dense"], times["dense channels-last"])
    return [
        {
            "model": name,
            "run": "compiled" if compiled else "eager",
            "z": z,
            "GMACs dense": found.dense_macs / 1e9,
            "with proposal": found.total_macs / 1e9,
            "ms dense": times["dense"],
            "channels-last": times["dense channels-last"],
            "ms pruned": times[str(z)],
            "speed-up": dense / times[str(z)],
            "speed-up / MAC ratio": dense / times[str(z)] * found.total_macs / found.dense_macs,
            "MB dense": memory["dense"],
            "MB pruned": memory[str(z)],
        }
        for z, found in reports.items()
    ]


def main() -> None:
    """Prints the table and writes out/pixels.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--z", nargs="+", type=float, default=[0.8, 0.65, 0.5])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument("--out", type=Path, default=Path("out/pixels.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = [
        row
        for name in arguments.models
        for kind in arguments.runs
        for row in measure(name, arguments.z, arguments.batch, arguments.rounds, compiled=kind == "compiled")
    ]
    print(f"batch {arguments.batch}, proposal {PROPOSAL} included in pruned times, speed-up over the quicker dense layout")
    print(f"{environment(0)}\n")
    formats = ("", "", "g", ".2f", ".2f", ".0f", ".0f", ".0f", ".2f", ".2f", ".0f", ".0f")
    print(tabulate(rows, headers="keys", floatfmt=formats, tablefmt="github"))
    write(arguments.out, rows, seed=0)


if __name__ == "__main__":
    main()
