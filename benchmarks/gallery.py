"""What EfficientNet-Lite0's map keeps of photographs and clips, as pictures. `python -m benchmarks.gallery [OUT]`.

Twelve photographs that scikit-image, scikit-learn and matplotlib ship, and two clips: an animation that scikit-image ships, and
a crop that moves over the photograph of a cat. A picture of a photograph shows the map and what a ViT keeps of it, with both
backgrounds, and in a second row the stages of a ConvNeXt; that of a clip what a VideoMAE keeps. The proposal has its ImageNet
weights and alone decides what is kept, so the weights of the models are random. Printed is what the map prefers in noise.
`docs/gallery.md` shows the pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

import papr_fx
from papr_fx.cli.clips import shown_frames
from papr_fx.cli.draw import draw, draw_clip
from papr_fx.cli.kept import kept_levels, title
from papr_fx.evaluation.image_file import read_image
from papr_fx.evaluation.models import image_model, proposal_for, video_model
from papr_fx.ops import resize_map
from papr_fx.planning import inputs
from papr_fx.planning.module import PrunedModule
from papr_fx.proposals.named import LITE0
from papr_fx.proposals.statistics import Statistics
from papr_fx.video import read_video

PHOTOGRAPHS = {
    "astronaut": "skimage/data/astronaut.png",
    "chelsea": "skimage/data/chelsea.png",
    "coffee": "skimage/data/coffee.png",
    "rocket": "skimage/data/rocket.jpg",
    "china": "sklearn/datasets/images/china.jpg",
    "flower": "sklearn/datasets/images/flower.jpg",
    "grace_hopper": "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
    "retina": "skimage/data/retina.jpg",
    "hubble_deep_field": "skimage/data/hubble_deep_field.jpg",
    "ihc": "skimage/data/ihc.png",
    "camera": "skimage/data/camera.png",  # grey, as the next one
    "coins": "skimage/data/coins.png",
}
ANIMATION = "skimage/data/no_time_for_that_tiny.gif"
CLIPS = ("animation", "moving_crop")
RATIOS, STAGES_RATIO = (0.5, 0.3), 0.5
BACKGROUNDS = ("auto", "coarse")
_PHOTOGRAPH_DPI, _CLIP_DPI = 50, 70


@dataclass(frozen=True)
class Pruned:
    """A model pruned with each background, and the mean and std of its pixels."""

    gms: tuple[PrunedModule, ...]
    statistics: Statistics

    @classmethod
    def of(cls, model: nn.Module, example: Tensor, statistics: Statistics, backgrounds: tuple[str, ...]) -> Pruned:
        """Prunes a model by the map of EfficientNet-Lite0."""
        proposal, stats = proposal_for(statistics, LITE0, pretrained=False)
        options: dict[str, Any] = {"example_input": example, "input_stats": stats, "verify": False}
        gms = [papr_fx.transform(model, proposal, RATIOS[0], background=cast(Any, name), **options) for name in backgrounds]
        return cls(tuple(gms), statistics)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels (..., 3, H, W) in [0, 1], as a batch of one that the model takes."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in self.statistics)
        return ((pixels - mean) / std).unsqueeze(0)

    def kept(self, pixels: Tensor, ratios: tuple[float, ...]) -> dict[str, Tensor]:
        """How much is kept of each position, by title: for each ratio, background and grid."""
        found: dict[str, Tensor] = {}
        for z in ratios:
            for gm in self.gms:
                papr_fx.set_keep_ratio(gm, z)
                levels = kept_levels(gm, self.normalised(pixels)).values()
                found |= {title(z, level[0]): level[0] for level in levels}
        return found

    def map_of(self, pixels: Tensor) -> Tensor:
        """The map (h, w) of an image, or (t, h, w) of a clip."""
        return papr_fx.significance(self.gms[0], self.normalised(pixels))[0]


def shipped(place: str) -> Path:
    """A file of an installed package, such as skimage/data/coffee.png."""
    package, _, inside = place.partition("/")
    return Path(str(files(package).joinpath(inside)))


def photograph(name: str, size: int) -> Tensor:
    """The centre of a photograph, (3, size, size) in [0, 1]."""
    preprocess: Any = create_transform((3, size, size), interpolation="bicubic", mean=(0,) * 3, std=(1,) * 3, crop_pct=1.0)
    return preprocess(read_image(shipped(PHOTOGRAPHS[name])))


def clip(name: str, frames: int, size: int) -> Tensor:
    """The frames of a clip, (frames, 3, size, size) in [0, 1]."""
    if name == "animation":
        return shown_frames(read_video(shipped(ANIMATION), frames=frames), size)
    cat = pil_to_tensor(read_image(shipped(PHOTOGRAPHS["chelsea"])))  # (3, H, W), wider than high
    side, width = cat.shape[1:]
    starts = torch.linspace(0, width - side, frames).round().int().tolist()
    return shown_frames(torch.stack([cat[:, :, start : start + side] for start in starts]), size)


def columns_of_noise(pruned: Pruned, size: int, images: int = 8) -> list[float]:
    """The means of the columns of the map, in 0..1: what the network prefers where there is nothing to see."""
    noise = torch.rand((images, 3, size, size), generator=torch.Generator().manual_seed(0))
    columns = torch.stack([pruned.map_of(image).float() for image in noise]).mean((0, 1))  # (w,)
    return ((columns - columns.min()) / (columns.max() - columns.min())).tolist()


def draw_photographs(out: Path, names: list[str], vit: str, convnext: str) -> Iterator[Path]:
    """Draws a picture for each photograph."""
    tokens, pixels = (image_model(name, pretrained=False) for name in (vit, convnext))
    size = int(resolve_model_data_config(tokens)["input_size"][-1])
    example = torch.zeros(1, 3, size, size)
    models = [
        Pruned.of(model, example, _statistics(model), backgrounds)
        for model, backgrounds in ((tokens, BACKGROUNDS), (pixels, BACKGROUNDS[:1]))
    ]
    for name in names:
        image, path = photograph(name, size), out / f"{name}.jpg"
        rows = [models[0].kept(image, RATIOS), models[1].kept(image, (STAGES_RATIO,))]
        draw(path, image, models[0].map_of(image), rows, dpi=_PHOTOGRAPH_DPI)
        yield path
    print("columns of the map of noise:", *(f"{value:.2f}" for value in columns_of_noise(models[0], size)))


def draw_clips(out: Path, names: list[str], video: str) -> Iterator[Path]:
    """Draws a picture for each clip."""
    named = video_model(video, pretrained=False)
    example = inputs.example_images(named.model, None)  # (1, T, C, H, W)
    pruned = Pruned.of(named.model, example, named.statistics, BACKGROUNDS)
    for name in names:
        frames, path = clip(name, example.shape[1], example.shape[-1]), out / f"{name}.jpg"
        kept = pruned.kept(frames, RATIOS)
        grid = next(iter(kept.values())).shape
        draw_clip(path, frames, resize_map(pruned.map_of(frames).unsqueeze(0), tuple(grid))[0], kept, dpi=_CLIP_DPI)
        yield path


def _statistics(model: nn.Module) -> Statistics:
    config: Mapping[str, Any] = resolve_model_data_config(model)
    return config["mean"], config["std"]


def main() -> None:
    """Draws the pictures, and prints their names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("out/gallery"), help="folder of the pictures")
    parser.add_argument("--only", nargs="+", choices=(*PHOTOGRAPHS, *CLIPS), default=[*PHOTOGRAPHS, *CLIPS])
    parser.add_argument("--vit", default="vit_small_patch16_224")
    parser.add_argument("--convnext", default="convnext_tiny")
    parser.add_argument("--video", default="videomae_base")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    photographs, clips = ([name for name in kind if name in arguments.only] for kind in (PHOTOGRAPHS, CLIPS))
    if photographs:
        for path in draw_photographs(arguments.out, photographs, arguments.vit, arguments.convnext):
            print(path)
    if clips:
        for path in draw_clips(arguments.out, clips, arguments.video):
            print(path)


if __name__ == "__main__":
    main()
