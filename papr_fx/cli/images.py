"""`papr-fx show` and `demo` on an image: the map and the kept patches as one picture."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from ..planning.module import PrunedModule, set_keep_ratio
from ..queries import significance
from ..transform import transform
from .kept import kept_levels, title
from .networks import image_proposal, model_of

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class PrunedImage:
    """A model, and what it is shown.

    Attributes:
        model: The dense model.
        gm: The model pruned at the first keep ratio.
        images: The preprocessed image (1, 3, H, W).
        photograph: The same image in [0, 1], (3, H, W).
    """

    model: nn.Module
    gm: PrunedModule
    images: Tensor
    photograph: Tensor


def prune_image(arguments: argparse.Namespace, image: Image) -> PrunedImage:
    """Builds and prunes the model, and preprocesses an image for it."""
    model = model_of(arguments)
    proposal, statistics = image_proposal(arguments, model)
    config = resolve_model_data_config(model)
    images = cast(Any, create_transform(**config, is_training=False))(image).unsqueeze(0)  # (1, 3, H, W)
    background = arguments.background
    gm = transform(model, proposal, arguments.z[0], example_input=images, input_stats=statistics, background=background)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return PrunedImage(model, gm, images, images[0] * std + mean)


def draw_image(arguments: argparse.Namespace, pruned: PrunedImage) -> None:
    """Draws the photograph, its map and the kept patches at each keep ratio: one row, or one per ratio if there are stages."""
    from .draw import draw  # imports matplotlib

    rows: list[dict[str, Tensor]] = []
    for z in arguments.z:
        set_keep_ratio(pruned.gm, z)
        rows.append({title(z, level[0]): level[0] for level in kept_levels(pruned.gm, pruned.images).values()})
    one_grid = all(len(row) == 1 for row in rows)
    kept = [{words: level for row in rows for words, level in row.items()}] if one_grid else rows
    draw(arguments.out, pruned.photograph, significance(pruned.gm, pruned.images)[0], kept)
    print(f"picture: {arguments.out}")
