"""What proposal networks cost, on this CPU and, estimated, on an H100. `python -m benchmarks.proposals`.

Every network is cut, merged and folded as in `papr_fx.transform`. CPU: float32, all take turns. H100: bfloat16, lowered by
inductor without a GPU (see `benchmarks.lowering`). Weights are random. `benchmarks.photographs` measures how well a network
chooses.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from tabulate import tabulate

from papr_fx.evaluation.timing import median_times
from papr_fx.tracing.macs import count_module_macs

from .fake_cuda import GPUS
from .lowering import Target, lower
from .photographs import significance_net
from .record import environment, write

NETWORKS = (
    "mobileone_s0",
    "lcnet_035",
    "lcnet_050",
    "mobilenetv3_small_050",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small_050",
    "repghostnet_050",
    "resnet10t",
    "resnet18",
    "efficientnet_lite0",
)


def costs(names: list[str], sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """One row for each network and image size."""
    networks = {(name, size): significance_net(timm.create_model(name).eval(), size) for name in names for size in sizes}
    images = torch.randn(8, 3, 224, 224)
    times = median_times(
        {f"{name} {size}": lambda network=network: network(images) for (name, size), network in networks.items()},
        rounds=rounds,
    )
    target = Target(GPUS[90], torch.bfloat16, compile_kernels=False)
    rows: list[dict[str, Any]] = []
    for (name, size), network in networks.items():
        lowering = lower(network, (128, 3, 224, 224), target)
        rows.append(
            {
                "proposal": name,
                "px": size,
                "GMACs": count_module_macs(network, images[:1]) / 1e9,
                "ms CPU, 8 images": times[f"{name} {size}"],
                "kernels": lowering.count,
                "GB H100, 128 images": lowering.bytes / 1e9,
                "ms H100": lowering.ms,
            }
        )
    return rows


def main() -> None:
    """Prints the tables and writes out/proposals.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proposal", nargs="+", default=list(NETWORKS))
    parser.add_argument("--proposal-size", nargs="+", type=int, default=[224, 160])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/proposals.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = costs(arguments.proposal, arguments.proposal_size, arguments.rounds)
    print(f"{environment(0)}\n")
    print(tabulate(rows, headers="keys", floatfmt=("", "d", ".3f", ".0f", "d", ".2f", ".2f"), tablefmt="github"))
    write(arguments.out, rows, seed=0)


if __name__ == "__main__":
    main()
