"""A dense model with trained weights, dense beside pruned. `python -m benchmarks.trained_picture WEIGHTS PNG`.

WEIGHTS is the ONNX file that `benchmarks.saliency_vit` tells of. The photographs are those that scikit-image ships. Each row is
a photograph and its saliency maps: of the dense model, and of the model that keeps a share of the tokens, with dropped places
filled by the nearest kept token, and with a coarse background. Titles give the correlation with the dense model's map.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import skimage.data
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

import papr_fx

from .saliency_vit import Saliency, read_weights
from .trained_vit import BACKGROUNDS, STATISTICS, correlation, pruned

PHOTOGRAPHS = ("chelsea", "coffee", "astronaut", "rocket")


def photograph(name: str, size: int = 224) -> Tensor:
    """The centre of a photograph of scikit-image, (1, 3, size, size) in 0..1."""
    pixels = torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1)[None].float() / 255
    height, width = pixels.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[..., top : top + side, left : left + side]
    return F.interpolate(square, (size, size), mode="bilinear", antialias=True).clamp(0, 1)


@torch.inference_mode()
def maps_of(model: nn.Module, images: Tensor, z: float) -> dict[str, Tensor]:
    """Maps (n, 1, H, W) of the dense model, and of the pruned ones by background."""
    found = {"dense": model(images)}
    for background in BACKGROUNDS:
        gm = pruned(model, "psm", background, images[:1])
        papr_fx.set_keep_ratio(gm, z)
        found[background] = gm(images)
    return found


def draw(path: Path, photographs: Tensor, maps: dict[str, Tensor], z: float) -> None:
    """Draws a row for each photograph (n, 3, H, W)."""
    figure = Figure(figsize=(2.2 * (1 + len(maps)), 2.3 * len(photographs)), layout="constrained")
    axes: Any = figure.subplots(len(photographs), 1 + len(maps), squeeze=False)
    likeness = {name: correlation(found, maps["dense"]) for name, found in maps.items()}
    for row, image in enumerate(photographs):
        axes[row, 0].imshow(image.permute(1, 2, 0).numpy())
        for column, (name, found) in enumerate(maps.items(), 1):
            axes[row, column].imshow(found[row, 0].numpy(), vmin=0, vmax=1, cmap="magma")
            title = "dense" if name == "dense" else f"z={z:g}, {name}: {float(likeness[name][row]):.2f}"
            axes[row, column].set_title(title, fontsize=8)
    for ax in axes.flat:
        ax.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=70)


def main() -> None:
    """Draws the picture, and prints the correlations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="ONNX file")
    parser.add_argument("picture", type=Path, help="PNG file")
    parser.add_argument("--z", type=float, default=0.3)
    arguments = parser.parse_args()
    photographs = torch.cat([photograph(name) for name in PHOTOGRAPHS])
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in STATISTICS)
    maps = maps_of(Saliency(read_weights(arguments.weights)), (photographs - mean) / std, arguments.z)
    for name, found in maps.items():
        values = correlation(found, maps["dense"]).tolist()
        print(name, *(f"{photo} {value:.3f}" for photo, value in zip(PHOTOGRAPHS, values, strict=True)))
    draw(arguments.picture, photographs, maps, arguments.z)


if __name__ == "__main__":
    main()
