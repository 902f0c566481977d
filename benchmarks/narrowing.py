"""ViTs dense, with all rows computed, and with those that are read, one thread. `python -m benchmarks.narrowing --compile`."""

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from tabulate import tabulate
from torch import nn

import papr_fx
from papr_fx.evaluation.timing import median_times

from .record import environment, write

MODELS = ("vit_small_patch16_224", "vit_base_patch16_224")
PROPOSAL = "mobileone_s0"


def measure(name: str, z: float, batch: int, rounds: int, compiled: bool) -> list[dict[str, Any]]:
    """A row for each of the two pruned forms; they and the dense model take turns in one run."""
    model, proposal = timm.create_model(name).eval(), timm.create_model(PROPOSAL)
    pruned = {rows: papr_fx.transform(model, proposal, z, narrow=rows == "read", verify=False) for rows in ("all", "read")}
    modules: dict[str, nn.Module] = {"dense": model, **pruned}
    variants: dict[str, Any] = {key: torch.compile(module) if compiled else module for key, module in modules.items()}
    images = torch.randn(batch, 3, 224, 224)
    times = median_times({key: lambda run=run: run(images) for key, run in variants.items()}, rounds=rounds)
    rows: list[dict[str, Any]] = []
    for key, gm in pruned.items():
        found = papr_fx.report(gm)
        speed, macs = times["dense"] / times[key], found.dense_macs / found.total_macs
        rows.append(
            {
                "model": name,
                "z": z,
                "rows": key,
                "with proposal": found.total_macs / 1e9,
                "ms dense": times["dense"],
                "ms pruned": times[key],
                "speed-up": speed,
                "MAC ratio": macs,
                "of it": speed / macs,
            }
        )
    return rows


def main() -> None:
    """Prints the table and writes out/narrowing.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--z", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out/narrowing.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        rows += measure(name, arguments.z, arguments.batch, arguments.rounds, arguments.compile)
    run = "compiled" if arguments.compile else "eager"
    print(f"batch {arguments.batch}, {run}, proposal {PROPOSAL} included; {environment(0)}\n")
    formats = ("", "g", "", ".2f", ".0f", ".0f", ".2f", ".2f", ".2f")
    print(tabulate(rows, headers="keys", floatfmt=formats, tablefmt="github"))
    write(arguments.out, rows, seed=0)


if __name__ == "__main__":
    main()
