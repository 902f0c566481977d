"""Whether a separate keep ratio per stage pays, on objects in clutter. `python -m benchmarks.stages`.

A small ConvNeXt and the proposal are trained first (`examples.clutter`), without pruning. Then one ratio for all stages is
compared with a ratio per stage at equal multiply-accumulates: those that do best on one half of the held-out images are
measured on the other half.
"""

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import papr_fx
from examples.clutter import SIDE, Images, accuracy, cluttered, proposal_for, train
from papr_fx.ops import top_positions
from papr_fx.planning.module import PrunedModule
from papr_fx.tracing.macs import count_macs_by_node

from .record import environment, write


class Block(nn.Module):
    """A ConvNeXt block, with a batch norm, which learns in fewer steps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.BatchNorm2d(width)
        self.mlp = nn.Sequential(nn.Conv2d(width, 4 * width, 1), nn.GELU(), nn.Conv2d(4 * width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W)."""
        return x + self.mlp(self.norm(self.mix(x)))


class SmallConvNeXt(nn.Module):
    """Three stages of 28, 14 and 7 rows, with about equal multiply-accumulates per block."""

    def __init__(self) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for before, width in ((3, 32), (32, 64), (64, 128)):
            down = nn.Sequential(nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width))
            stages.append(nn.Sequential(down, Block(width), Block(width)))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to logits (B, 10)."""
        return self.head(self.stages(images).mean((2, 3)))


def with_ratios(gm: PrunedModule, ratios: tuple[float, ...]) -> int:
    """Sets a keep ratio for each grid, finest first; returns multiply-accumulates of an image."""
    chosen = [node for node in gm.graph.nodes if node.target is top_positions]
    for node, z in zip(chosen, ratios, strict=True):
        node.args = (node.args[0], z, *node.args[2:])
    gm.recompile()
    return sum(count_macs_by_node(gm.for_shapes(), gm.graph, gm.example()).values())


def measure(gm: PrunedModule, halves: tuple[Images, Images], uniform: float, choices: list[float]) -> dict[str, Any]:
    """One row: top-1 in percent with one ratio, and with the best ratios per stage whose MACs are within 2 % of its MACs."""
    stages = len(papr_fx.keep_masks(gm, halves[0].pixels[:1].float()))
    macs = with_ratios(gm, (uniform,) * stages)
    row: dict[str, Any] = {"z": uniform, "MMACs": macs / 1e6, "one ratio": accuracy(gm, halves[1])}
    near = [some for some in product(choices, repeat=stages) if abs(with_ratios(gm, some) - macs) < 0.02 * macs]
    found: list[tuple[float, tuple[float, ...]]] = []
    for some in tqdm(near, desc=f"z={uniform:g}", leave=False):
        with_ratios(gm, some)
        found.append((accuracy(gm, halves[0]), some))
    _, best = max(found)
    spent = with_ratios(gm, best)
    row |= {"ratios tried": len(near), "best": " ".join(map(str, best)), "its MMACs": spent / 1e6}
    return row | {"a ratio a stage": accuracy(gm, halves[1])}


def main() -> None:
    """Prints the table and writes out/stages.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--z", nargs="+", type=float, default=[0.3, 0.2, 0.1, 0.05])
    parser.add_argument("--choices", nargs="+", type=float, default=[0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--images", type=int, default=12000, help="images for training")
    parser.add_argument("--background", choices=("auto", "keep", "zero"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("out/stages.json"))
    arguments = parser.parse_args()
    images, held_out = cluttered(arguments.images, test=False), cluttered(max(2, arguments.images // 6), test=True)
    half = len(held_out.labels) // 2
    halves = Images(*(part[:half] for part in held_out)), Images(*(part[half:] for part in held_out))
    proposal = proposal_for(images, arguments.steps)
    torch.manual_seed(1)
    model = SmallConvNeXt()
    train(model, images, arguments.steps, rate=3e-3, name="ConvNeXt")
    like = torch.zeros(1, 3, SIDE, SIDE)
    dense = accuracy(model, halves[1])
    gm = papr_fx.transform(model.eval(), proposal, 0.5, example_input=like, background=arguments.background)
    rows = [measure(gm, halves, z, arguments.choices) for z in arguments.z]
    print(f"{environment(1)}\n{half} held-out images; dense {dense:.1f} % right\n")
    print(tabulate(rows, headers="keys", floatfmt=("g", ".1f", ".1f", "d", "", ".1f", ".1f"), tablefmt="github"))
    write(arguments.out, rows, seed=1)


if __name__ == "__main__":
    main()
