"""Accuracy against keep ratio on objects in clutter: PSM, other maps, merging. `python -m benchmarks.clutter`.

The ViT and the proposal are trained first (`examples.clutter`), in minutes. The ViT is trained without pruning and pruned
afterwards. Merging runs at the MACs of the pruned model, its proposal included.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import papr_fx
from examples.clutter import Images, accuracy, cluttered, proposal_for, small_vit, train
from papr_fx.peers import at_macs, kept_before, reduction_named

from .record import environment, write


def inverse(features: Tensor) -> Tensor:
    """A map that ranks the least significant positions first."""
    return -features.mean(1)


def centre(features: Tensor) -> Tensor:
    """A map that ranks positions near the middle of the image first."""
    rows, columns = (torch.linspace(-1, 1, size) for size in features.shape[2:])
    near = -(rows.unsqueeze(1) ** 2 + columns**2)
    return near.to(features).expand(len(features), -1, -1)


MAPS: dict[str, Any] = {
    "psm": "psm",
    "expected-cam": "expected-cam",
    "cam": "cam",
    "gradcam": "gradcam",
    "centre": centre,
    "random": "random",
    "inverse": inverse,
}
REDUCERS = ("tome", "papr+tome", "tofu", "gtp", "ats")


def measure(
    model: nn.Module, proposal: nn.Module, images: Images, ratios: list[float], done: Callable[[], object]
) -> list[Any]:
    """One row per method: top-1 in percent at each keep ratio."""
    rows: list[dict[str, Any]] = []
    totals: dict[float, int] = {}
    for name, saliency in MAPS.items():
        gm = papr_fx.transform(model, proposal, ratios[0], saliency=saliency)
        row: dict[str, Any] = {"method": name}
        for z in ratios:
            papr_fx.set_keep_ratio(gm, z)
            totals.setdefault(z, papr_fx.report(gm).total_macs)  # of the first, which is PaPr
            row[f"z={z:g}"] = accuracy(gm, images)
            done()
        rows.append(row)
    for name in REDUCERS:
        gm = papr_fx.transform(model, proposal, 1, merge=reduction_named(name))
        row = {"method": name}
        for z in ratios:
            papr_fx.set_keep_ratio(gm, kept_before(z) if name.startswith("papr+") else 1.0)
            row[f"z={z:g}"] = accuracy(at_macs(gm, totals[z]), images)
            done()
        rows.append(row)
    return [{"method": "GMACs", **{f"z={z:g}": total / 1e9 for z, total in totals.items()}}, *rows]


def plot(rows: list[dict[str, Any]], ratios: list[float], dense: float, path: Path) -> None:
    """Draws the table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        dashed = row["method"] not in MAPS
        axes.plot(ratios, [row[f"z={z:g}"] for z in ratios], "o--" if dashed else "o-", markersize=4, label=row["method"])
    axes.axhline(dense, color="grey", linewidth=1, label="dense")
    axes.set_xlabel("keep ratio z (dashed: at the MACs of PaPr at z)")
    axes.set_ylabel("top-1, %")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Prints the table, and writes out/clutter.json and the plot out/clutter.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--z", nargs="+", type=float, default=[0.7, 0.5, 0.3, 0.2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--images", type=int, default=12000, help="images for training")
    parser.add_argument("--out", type=Path, default=Path("out/clutter.json"))
    arguments = parser.parse_args()
    images, held_out = cluttered(arguments.images, test=False), cluttered(max(1, arguments.images // 6), test=True)
    proposal = proposal_for(images, arguments.steps)
    torch.manual_seed(1)
    model = small_vit()
    train(model, images, arguments.steps, rate=2.5e-3, name="ViT")
    dense, own = accuracy(model, held_out), accuracy(proposal, held_out)
    with tqdm(total=len(arguments.z) * (len(MAPS) + len(REDUCERS)), leave=False) as bar:
        macs, *rows = measure(model, proposal, held_out, arguments.z, lambda: bar.update())
    print(f"{environment(1)}\n{len(held_out.labels)} held-out images; ViT dense: {dense:.1f} % right, proposal: {own:.1f} %")
    print("MACs, in 1e9, proposal included: " + ", ".join(f"{z} {count:.3f}" for z, count in [*macs.items()][1:]) + "\n")
    print(tabulate(rows, headers="keys", floatfmt=".1f", tablefmt="github"))
    write(arguments.out, [{"method": "dense", "top-1": dense}, {"method": "proposal", "top-1": own}, macs, *rows], seed=1)
    plot(rows, arguments.z, dense, arguments.out.with_suffix(".png"))
    print(f"\nplot: {arguments.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
