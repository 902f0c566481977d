"""Prunes a depth model from end to end, on a photograph. `python -m examples.depth --z 0.5 --background coarse`.

The model is a Depth-Anything of transformers. Unless `--pretrained` names one, or a folder, its weights are random, in the size
of Depth-Anything-S: times are those of the trained model, maps are not. Kept tokens go back to their places before the decoder.
The photograph, the dense map and the pruned one are drawn side by side. docs/dense.md explains it.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, resize, to_tensor

import papr_fx

PATCH = 14


def depth_model(given: argparse.Namespace) -> nn.Module:
    """A trained Depth-Anything, or one with random weights: images (B, 3, H, W) to depths (B, H, W)."""
    if given.pretrained:
        return transformers.AutoModelForDepthEstimation.from_pretrained(given.pretrained).eval()
    width, layers = given.hidden_size, given.num_layers
    stages: dict[str, Any] = {"out_features": [f"stage{layers * quarter // 4}" for quarter in range(1, 5)]}
    backbone = transformers.Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        image_size=given.img_size,
        reshape_hidden_states=False,
        **stages,
    )
    neck = [width // 8, width // 4, width // 2, width]
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=width, neck_hidden_sizes=neck, fusion_hidden_size=max(16, width // 6)
    )
    return transformers.DepthAnythingForDepthEstimation(config).eval()


def photograph(path: Path | None, side: int) -> Tensor:
    """An image (3, side, side) in 0..1: a file, or a cup of coffee that scikit-image ships."""
    if path is None:
        from skimage import data

        image = to_tensor(data.coffee())
    else:
        image = to_tensor(Image.open(path).convert("RGB"))
    return resize(image, [side, side], antialias=True).clamp(0, 1)


def milliseconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median times of calls that take turns, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(found[1:]) for name, found in times.items()}


def draw(path: Path, panels: dict[str, Tensor]) -> None:
    """Writes pictures (3, H, W) and maps (H, W) side by side."""
    figure = Figure(figsize=(4 * len(panels), 4.3), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (title, value) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        panel.imshow((value.permute(1, 2, 0) if value.ndim == 3 else value).numpy(), cmap="inferno")
        panel.set_title(title)
        panel.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Prints and returns the figures, and draws the maps."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pretrained", default="", metavar="NAME", help="a Depth-Anything of the hub, or a folder")
    options.add_argument("--hidden-size", type=int, default=384, help="of random weights")
    options.add_argument("--num-layers", type=int, default=12, help="of random weights; a multiple of 4")
    options.add_argument("--img-size", type=int, default=518, help=f"the side of the square image; a multiple of {PATCH}")
    options.add_argument("--proposal", default="lite0", help="its weights are loaded; lite0's come with pip")
    options.add_argument("--z", type=float, default=0.5, help="keep ratio")
    options.add_argument("--background", default="drop", choices=("drop", "coarse"), help="of dropped patches")
    options.add_argument("--image", type=Path, help="default: a photograph that scikit-image ships")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--output", type=Path, default=Path("out/depth.png"))
    given = options.parse_args(arguments)
    torch.manual_seed(0)
    model = depth_model(given)
    image = photograph(given.image, given.img_size)
    images = normalize(image, list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD))[None]
    gm = papr_fx.transform(model, given.proposal, given.z, example_input=images, background=given.background)

    def depth(module: nn.Module) -> Tensor:
        return module(images).predicted_depth[0]

    found = milliseconds({"dense, ms": lambda: depth(model), "pruned, ms": lambda: depth(gm)}, given.rounds)
    dense, pruned = depth(model), depth(gm)
    found["correlation"] = torch.corrcoef(torch.stack([dense.flatten(), pruned.flatten()]).double())[0, 1].item()
    counted = papr_fx.report(gm)
    print(f"{counted.dense_macs / 1e9:.1f} GMACs dense, {counted.total_macs / 1e9:.1f} with the proposal at z={given.z:g}")
    print(f"{found['dense, ms']:.0f} ms dense, {found['pruned, ms']:.0f} pruned; correlation {found['correlation']:.3f}")
    weights = "" if given.pretrained else ", random weights"
    draw(given.output, {"photograph": image, f"dense{weights}": dense, f"z={given.z:g}, {given.background}": pruned})
    print(f"picture: {given.output}")
    return found


if __name__ == "__main__":
    main()
