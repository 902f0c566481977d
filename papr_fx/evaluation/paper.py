"""The paper's tables, one entry per model: what was run and what was measured (PaPr, ECCV 2024, Tab. 2, 6 and 9)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class Line:
    """One line of a table.

    Attributes:
        top1: Top-1 accuracy in percent.
        gmacs: Multiply-accumulates per image or view, in 1e9, the proposal included.
        img_per_sec: Images per second on an RTX A5000; 0 if the paper does not state it.
        z: Keep ratio; 1 for the dense model.
        merging: Whether tokens are also merged in the second half of the blocks.
    """

    top1: float
    gmacs: float
    img_per_sec: float = 0
    z: float = 1.0
    merging: bool = False


@dataclass(frozen=True)
class Table:
    """A model of the paper.

    Attributes:
        where: The table in the paper.
        model: Name of the model with random weights.
        lines: What was measured, the dense model first.
        pretrained: Name of the model with its weights; "" if the weights are only available as a file.
        proposal: The proposal network.
        options: Further options of `timm.create_model`.
        data: How its images differ from timm's data configuration.
    """

    where: str
    model: str
    lines: tuple[Line, ...]
    pretrained: str = ""
    proposal: str = "mobileone_s0.apple_in1k"
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])


def _timm(where: str, name: str, *lines: Line) -> Table:
    return Table(where, name, lines, name)


def _mae(name: str, *lines: Line) -> Table:
    """A fine-tuned masked autoencoder: its head averages over patches."""
    return Table("Tab. 2", name, lines, options={"global_pool": "avg"}, data={"crop_pct": 0.875, **IMAGENET})


def _clips(size: str, *lines: Line) -> Table:
    """A video model. X3D-M at the clip's own size gives the paper's multiply-accumulates."""
    return Table("Tab. 9", f"videomae_{size}", lines, f"MCG-NJU/videomae-{size}-finetuned-kinetics", "x3d_m")


TABLES: Mapping[str, Table] = {
    "vit-s": _timm(
        "Tab. 2",
        "vit_small_patch16_224.augreg_in21k_ft_in1k",
        Line(81.39, 4.61, 975),
        Line(76.21, 2.29, 1988, 0.45),
        Line(77.76, 2.19, 2073, 0.55, merging=True),
        Line(76.27, 1.97, 2315, 0.5, merging=True),
    ),
    "vit-b": _timm(
        "Tab. 2",
        "vit_base_patch16_224.augreg_in21k_ft_in1k",
        Line(84.59, 17.59, 307),
        Line(82.11, 8.98, 605, 0.5),
        Line(82.34, 8.21, 660, 0.55, merging=True),
        Line(80.88, 6.82, 785, 0.5, merging=True),
    ),
    "vit-l": _timm(
        "Tab. 2",
        "vit_large_patch16_224.augreg_in21k_ft_in1k",
        Line(85.82, 61.61, 91),
        Line(83.87, 30.83, 183, 0.5),
        Line(83.99, 26.33, 210, 0.55, merging=True),
        Line(83.5, 25.12, 224, 0.55, merging=True),
    ),
    "mae-b": _mae("vit_base_patch16_224", Line(83.74, 17.59, 307), Line(82.4, 8.98, 605, 0.5), Line(81.4, 7.72, 700, 0.4)),
    "mae-l": _mae("vit_large_patch16_224", Line(85.95, 61.61, 91), Line(85.06, 30.83, 183, 0.5), Line(84.76, 27.72, 201, 0.4)),
    "mae-h": _mae("vit_huge_patch14_224", Line(86.89, 167.4, 36), Line(86.4, 83.04, 71, 0.5), Line(86.13, 74.59, 81, 0.4)),
    "convnext-b": _timm("Tab. 6", "convnext_base.fb_in1k", Line(83.84, 15.38, 265), Line(82.75, 10.42, 395, 0.65)),
    "convnext-b-22k": _timm("Tab. 6", "convnext_base.fb_in22k_ft_in1k", Line(85.81, 15.38, 265), Line(84.27, 10.42, 395, 0.65)),
    "convnext-l": _timm("Tab. 6", "convnext_large.fb_in1k", Line(84.31, 34.4, 135), Line(83.26, 22.9, 203, 0.65)),
    "convnext-l-22k": _timm("Tab. 6", "convnext_large.fb_in22k_ft_in1k", Line(86.61, 34.4, 135), Line(85.67, 22.9, 203, 0.65)),
    "swin-b": _timm("Tab. 6", "swin_base_patch4_window7_224.ms_in1k", Line(83.42, 15.47, 258), Line(81.7, 12.25, 325, 0.65)),
    "swin-b-22k": _timm(
        "Tab. 6", "swin_base_patch4_window7_224.ms_in22k_ft_in1k", Line(85.16, 15.47, 258), Line(82.27, 12.25, 325, 0.65)
    ),
    "swin-l-22k": _timm(
        "Tab. 6", "swin_large_patch4_window7_224.ms_in22k_ft_in1k", Line(86.25, 34.53, 135), Line(84.53, 26.96, 175, 0.65)
    ),
    "swin-l-384": _timm(
        "Tab. 6", "swin_large_patch4_window12_384.ms_in22k_ft_in1k", Line(87.25, 104.08, 42), Line(86.47, 81.44, 54, 0.65)
    ),
    "videomae-b": _clips("base", Line(81.21, 180), Line(81.18, 76, z=0.45), Line(80.15, 59, z=0.35)),
    "videomae-l": _clips("large", Line(85.26, 598), Line(85.12, 275, z=0.5), Line(84.53, 160, z=0.3)),
}
