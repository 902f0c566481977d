"""Depth and segmentation models of transformers, dense and pruned, one thread. `python -m benchmarks.dense --rounds 5`.

Weights are random: times and sizes are those of the trained models, maps are not.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn

import papr_fx
from papr_fx.evaluation.timing import median_times
from papr_fx.tracing.numerics import relative_error

from .record import environment, write

PROPOSAL = "mobileone_s0"
_STAGES = {"out_features": ["stage3", "stage6", "stage9", "stage12"], "image_size": 518}


def _dinov2(width: int, **options: Any) -> transformers.Dinov2Config:
    return transformers.Dinov2Config(hidden_size=width, num_attention_heads=width // 64, **_STAGES, **options)


def _depth_anything(width: int, neck: list[int], fusion: int) -> nn.Module:
    config = transformers.DepthAnythingConfig(
        backbone_config=_dinov2(width, reshape_hidden_states=False),
        reassemble_hidden_size=width,
        neck_hidden_sizes=neck,
        fusion_hidden_size=fusion,
    )
    return transformers.DepthAnythingForDepthEstimation(config)


def _upernet() -> nn.Module:
    config = transformers.UperNetConfig(backbone_config=_dinov2(384), hidden_size=128, auxiliary_in_channels=384)
    config.num_labels = 150
    return transformers.UperNetForSemanticSegmentation(config)


# Each with the side of its images.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "Depth-Anything-S": (lambda: _depth_anything(384, [48, 96, 192, 384], 64), 518),
    "Depth-Anything-B": (lambda: _depth_anything(768, [96, 192, 384, 768], 128), 518),
    "DPT-L": (lambda: transformers.DPTForDepthEstimation(transformers.DPTConfig()), 384),
    "UPerNet on DINOv2-S": (_upernet, 518),
}


def measure(name: str, ratios: list[float], batch: int, rounds: int, picture: Path | None) -> list[dict[str, Any]]:
    """A row for each keep ratio; these and the dense model take turns in one run."""
    make, side = MODELS[name]
    model, proposal = make().eval(), timm.create_model(PROPOSAL)
    example = torch.zeros(1, 3, side, side)
    pruned = {z: papr_fx.transform(model, proposal, z, example_input=example, verify=False) for z in ratios}
    images = torch.randn(batch, 3, side, side)
    runs: dict[str, nn.Module] = {"dense": model, **{f"{z:g}": gm for z, gm in pruned.items()}}
    times = median_times({key: lambda run=run: run(images) for key, run in runs.items()}, rounds=rounds)
    maps = {key: _first(run, images) for key, run in runs.items()}
    if picture is not None:
        _draw(picture, name, {key: value[0] for key, value in maps.items()})
    rows: list[dict[str, Any]] = []
    for z, gm in pruned.items():
        found, key = papr_fx.report(gm), f"{z:g}"
        row = {"model": name, "z": z, "layouts": len(found.restored), "GMACs dense": found.dense_macs / 1e9}
        row |= {"with proposal": found.total_macs / 1e9, "ms dense": times["dense"], "ms pruned": times[key]}
        row |= {"speed-up": times["dense"] / times[key], "MAC ratio": found.dense_macs / found.total_macs}
        rows.append(row | {"off by": relative_error(maps[key], maps["dense"])})
    return rows


@torch.no_grad()
def _first(model: nn.Module, images: Tensor) -> Tensor:
    """The map of a model: depths (B, h, w), or the scores of the first class."""
    found = model(images)[0]
    return found if found.ndim == 3 else found[:, 0]


def _draw(path: Path, name: str, maps: dict[str, Tensor]) -> None:
    figure = Figure(figsize=(3 * len(maps), 3.3), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (key, value) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        panel.imshow(value.numpy(), cmap="inferno")
        panel.set_title(f"{name}, {key if key == 'dense' else f'z={key}'}", fontsize=8)
        panel.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Prints the table and writes out/dense.json, and a picture of the maps if asked for one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["Depth-Anything-S"], choices=MODELS)
    parser.add_argument("--z", type=float, nargs="+", default=[0.5])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--picture", type=Path, help="a PNG file with the maps of the last model side by side")
    parser.add_argument("--out", type=Path, default=Path("out/dense.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        rows += measure(name, arguments.z, arguments.batch, arguments.rounds, arguments.picture)
    print(f"batch {arguments.batch}, eager, proposal {PROPOSAL} included; {environment(0)}\n")
    formats = ("", "g", "", ".1f", ".1f", ".0f", ".0f", ".2f", ".2f", ".2f")
    print(tabulate(rows, headers="keys", floatfmt=formats, tablefmt="github"))
    write(arguments.out, rows, seed=0)


if __name__ == "__main__":
    main()
