"""ViTs dense and pruned, eager, one thread: tokens, GMACs, time. `python -m benchmarks.tokens`."""

import argparse
import time
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


def measure(name: str, ratios: list[float], batch: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """One row for each keep ratio; all variants of a model take turns in one run."""
    model = timm.create_model(name).eval().to(device)
    proposal = timm.create_model(PROPOSAL)
    images = torch.randn(batch, 3, 224, 224, device=device)
    pruned = {z: papr_fx.transform(model, proposal, z, narrow=False, verify=False) for z in ratios}  # as the paper has it
    variants: dict[str, nn.Module] = {"dense": model, **{str(z): gm for z, gm in pruned.items()}}
    times = median_times({key: lambda module=module: module(images) for key, module in variants.items()}, rounds=rounds)
    rows: list[dict[str, Any]] = []
    for z, gm in pruned.items():
        found = papr_fx.report(gm)
        speed, macs = times["dense"] / times[str(z)], found.dense_macs / found.total_macs
        rows.append(
            {
                "model": name,
                "z": z,
                "tokens": f"{found.sites[0].dense} -> {found.sites[0].kept}",
                "GMACs dense": found.dense_macs / 1e9,
                "GMACs pruned": found.pruned_macs / 1e9,
                "with proposal": found.total_macs / 1e9,
                "ms dense": times["dense"],
                "ms pruned": times[str(z)],
                "speed-up": speed,
                "MAC ratio": macs,
                "speed-up / MAC ratio": speed / macs,
            }
        )
    return rows


def transform_seconds(name: str) -> dict[bool, float]:
    """Seconds that `transform` takes, without and with proof."""
    model, proposal = timm.create_model(name).eval(), timm.create_model(PROPOSAL)
    seconds: dict[bool, float] = {}
    for verify in (False, True):
        start = time.perf_counter()
        papr_fx.transform(model, proposal, 0.5, verify=verify)
        seconds[verify] = time.perf_counter() - start
    return seconds


def main() -> None:
    """Prints the table and writes out/tokens.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--z", nargs="+", type=float, default=[0.7, 0.5, 0.3])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/tokens.json"))
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    seconds = {name: transform_seconds(name) for name in arguments.models}
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [row for name in arguments.models for row in measure(name, arguments.z, arguments.batch, arguments.rounds, device)]
    print(f"batch {arguments.batch}, eager, proposal {PROPOSAL} included in pruned times; {environment(0)}\n")
    formats = ("", "g", "", ".2f", ".2f", ".2f", ".0f", ".0f", ".2f", ".2f", ".2f")
    print(tabulate(rows, headers="keys", floatfmt=formats, tablefmt="github"))
    print(f"\ntransform, {threads} threads:")
    for name, taken in seconds.items():
        print(f"  {name}: {taken[False]:.1f} s without proof, {taken[True]:.1f} s with")
    write(arguments.out, rows, seed=0)


if __name__ == "__main__":
    main()
