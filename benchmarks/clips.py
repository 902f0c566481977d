"""Video transformers dense and pruned: GMACs, and time on one thread. `python -m benchmarks.clips`."""

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import papr_fx
from papr_fx.evaluation.models import video_model
from papr_fx.evaluation.timing import median_times
from papr_fx.proposals.named import create_network

from .record import Run, environment, write

# Keep ratios and GMACs of one view of 16 frames at 224 px with PaPr (Tab. 9 of the paper: dense 180 and 598).
PAPER = {"videomae_base": {0.45: 76, 0.35: 59}, "videomae_large": {0.5: 275, 0.3: 160}}
PROPOSALS: dict[str, tuple[int, int, int] | None] = {"x3d_m": None, "x3d_s": (13, 160, 160)}


def count(name: str, proposal: str) -> list[dict[str, Any]]:
    """One row for each of the paper's keep ratios, counted without weights."""
    with torch.device("meta"):
        model = video_model(name, pretrained=False).model
    gm = papr_fx.transform(
        model, create_network(proposal, pretrained=False), 0.5, proposal_size=PROPOSALS[proposal], verify=False
    )
    rows: list[dict[str, Any]] = []
    for z, published in PAPER[name].items():
        papr_fx.set_keep_ratio(gm, z)
        found = papr_fx.report(gm)
        rows.append(
            {
                "model": name,
                "proposal": proposal,
                "z": z,
                "tokens": f"{found.sites[0].dense} -> {found.sites[0].kept}",
                "GMACs dense": found.dense_macs / 1e9,
                "proposal's": found.proposal_macs / 1e9,
                "with proposal": found.total_macs / 1e9,
                "paper": published,
            }
        )
    return rows


def measure(name: str, proposal: str, size: tuple[int, ...] | None, run: Run) -> list[dict[str, Any]]:
    """One row for each keep ratio; all variants take turns in one run. `size` is the size of the proposal's clips."""
    model = video_model(name, pretrained=False).model.to(run.device)
    network = create_network(proposal, pretrained=False)
    pruned = {z: papr_fx.transform(model, network, z, proposal_size=size, verify=False) for z in PAPER[name]}
    clips = torch.randn((run.batch, *next(iter(pruned.values())).plan.example.shape[1:]), device=run.device)
    variants: dict[Any, Any] = {"dense": model, **pruned}
    if run.compiled:
        variants = {key: torch.compile(module, fullgraph=True) for key, module in variants.items()}
    times = median_times({str(key): lambda module=module: module(clips) for key, module in variants.items()}, rounds=run.rounds)
    rows: list[dict[str, Any]] = []
    for z, gm in pruned.items():
        found = papr_fx.report(gm)
        speed, macs = times["dense"] / times[str(z)], found.dense_macs / found.total_macs
        rows.append(
            {
                "model": name,
                "proposal": proposal,
                "batch": run.batch,
                "z": z,
                "ms dense": times["dense"],
                "ms pruned": times[str(z)],
                "speed-up": speed,
                "MAC ratio": macs,
                "of it": speed / macs,
            }
        )
    return rows


def main() -> None:
    """Prints the tables and writes out/clips.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["videomae_base"], choices=PAPER, help="to time; all are counted")
    parser.add_argument("--proposal", default="x3d_m", choices=PROPOSALS)
    parser.add_argument("--proposal-size", type=int, nargs=3, metavar=("FRAMES", "ROWS", "COLUMNS"), help="of its clips, timed")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="time compiled models, dense ones too")
    parser.add_argument("--out", type=Path, default=Path("out/clips.json"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="pytorchvideo|fvcore|iopath")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    counted = [row for name in PAPER for proposal in PROPOSALS for row in count(name, proposal)]
    print(tabulate(counted, headers="keys", floatfmt=".4g", tablefmt="github"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    size = tuple(arguments.proposal_size) if arguments.proposal_size else PROPOSALS[arguments.proposal]

    rows = [
        row
        for name in arguments.models
        for batch in arguments.batch
        for row in measure(name, arguments.proposal, size, Run(batch, arguments.rounds, device, arguments.compile))
    ]
    kind = "compiled" if arguments.compile else "eager"
    print(f"\n{kind}, proposal included in pruned times; {environment(0)}\n")
    print(tabulate(rows, headers="keys", floatfmt=("", "", "", "g", ".0f", ".0f", ".2f", ".2f", ".2f"), tablefmt="github"))
    write(arguments.out, [*counted, *rows], seed=0)


if __name__ == "__main__":
    main()
