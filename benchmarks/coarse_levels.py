"""Other rules for a coarse background, on a trained ViT. `python -m benchmarks.coarse_levels WEIGHTS FOLDER`.

WEIGHTS and FOLDER are those of `benchmarks.trained_vit`. A rule says for each image which patches stay fine, which quads of
2 x 2 patches are one token, and which squares of 4 x 4 are. This is a transcription by hand, for one model. Rules are compared
with the project's own, paired over images, on two halves of the photographs: choose on the first one, and believe the second.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import papr_fx
from papr_fx.ops import resize_map

from .record import environment, write
from .saliency_vit import backbone, read_weights
from .trained_vit import Photographs, outputs, probe, pruned, with_error

Rule = Callable[[Tensor, int], Tensor]


def quads_first(psm: Tensor, k: int, squares: int = 0) -> Tensor:
    """Tokens to take: the worst squares are one token each, the others four quads, of which the best are fine.

    Args:
        psm: Significance (h, w); h and w are multiples of 4.
        k: How many tokens there may be.
        squares: How many squares are one token. With 0 this is the project's rule.

    Returns:
        Rows of `levels`.
    """
    per_square = F.avg_pool2d(psm[None], 4)[0].flatten()
    worst = per_square.argsort()[:squares]
    open_quads = torch.ones_like(per_square).index_fill(0, worst, 0).view(psm.shape[0] // 4, -1)
    free = open_quads.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten().bool()
    order = F.avg_pool2d(psm[None], 2)[0].flatten().masked_fill(~free, -torch.inf).argsort(descending=True)[: int(free.sum())]
    fine = max(0, (k - squares - len(order)) // 3)
    return _rows(psm, order[:fine], order[fine : fine + k - squares - 4 * fine], worst)


def shared_out(psm: Tensor, k: int, share: float) -> Tensor:
    """Tokens to take: a share of k are patches of the best quads, and the others are the next quads, whatever is dropped."""
    order = F.avg_pool2d(psm[None], 2)[0].flatten().argsort(descending=True)
    fine = int(k * share) // 4
    return _rows(psm, order[:fine], order[fine : fine + k - 4 * fine], order[:0])


def _rows(psm: Tensor, fine: Tensor, quads: Tensor, squares: Tensor) -> Tensor:
    """Rows of `levels` for fine quads, and for quads and squares that are one token."""
    height, width = psm.shape
    first = fine // (width // 2) * 2 * width + fine % (width // 2) * 2
    patches = torch.cat([first, first + 1, first + width, first + width + 1])
    count = height * width
    return torch.cat([patches, count + quads, count + count // 4 + squares])


def levels(model: nn.Module, images: Tensor) -> Tensor:
    """Tokens (B, n + n / 4 + n / 16, C): those of patches, quads and squares, with their mean positions."""
    vit = cast(Any, model)
    side = int(vit.patch_embed.num_patches**0.5)
    places = vit.pos_embed[:, 1:].transpose(1, 2).reshape(1, -1, side, side)
    tokens = [vit.patch_embed.proj(F.avg_pool2d(images, size)) + F.avg_pool2d(places, size) for size in (1, 2, 4)]
    return torch.cat([value.flatten(2).transpose(1, 2) for value in tokens], 1)


def run(model: nn.Module, rule: Rule, k: int, maps: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The class tokens of images (B, 3, H, W), with the tokens that a rule takes."""
    vit = cast(Any, model)
    tokens = levels(model, images)
    rows = torch.stack([rule(psm, k) for psm in maps(images)])
    kept = tokens.gather(1, rows.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    stream = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1), kept], 1)
    return vit.norm(vit.blocks(stream))[:, 0]


def _significance(gm: papr_fx.PrunedModule, images: Tensor) -> Tensor:
    """The map of images (B, 3, H, W) on the grid of their patches, (B, h, w)."""
    rows = papr_fx.report(gm).sites[0].grid
    return resize_map(papr_fx.significance(gm, images), rows)


def rules() -> dict[str, Rule]:
    """The rules by name; the project's first."""
    found: dict[str, Rule] = {"every quad, best ones fine": quads_first}
    found |= {f"{count} of 16 squares are one token": partial(quads_first, squares=count) for count in (2, 4, 6, 8)}
    return found | {f"{share:.0%} of the tokens fine": partial(shared_out, share=share) for share in (0.0, 0.25, 0.5, 0.75)}


def measure(model: nn.Module, train: Photographs, test: Photographs, ratios: list[float]) -> Iterator[dict[str, Any]]:
    """Rows: one for each keep ratio and rule, with the probe's accuracy on both halves of the test images."""
    classify = probe(outputs(model, train.images, "training images"), train.classes)
    gm = pruned(model, "psm", "drop", test.images[:1])
    for z in ratios:
        k, base = int(z * (cast(Any, model).patch_embed.num_patches + 1)), None
        for name, rule in rules().items():
            features = outputs(partial(run, model, rule, k, partial(_significance, gm)), test.images, f"{name} {z:g}")
            right = (classify(features) == test.classes).float()
            base = right if base is None else base
            row: dict[str, Any] = {"z": z, "rule": name}
            for half, title in enumerate(("first half", "second half")):
                row[title], row[f"{title} +-"] = with_error(right[half::2], 100)
                row[f"{title} - ours"], row[f"{title} - ours +-"] = with_error((right - base)[half::2], 100)
            yield row


def main() -> None:
    """Prints the table, and writes out/coarse_levels.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="ONNX file")
    parser.add_argument("folder", type=Path, help="photographs")
    parser.add_argument("--z", nargs="+", type=float, default=[0.5, 0.3, 0.2])
    parser.add_argument("--images", type=int, help="at most as many test images")
    parser.add_argument("--out", type=Path, default=Path("out/coarse_levels.json"))
    arguments = parser.parse_args()
    train, test = Photographs.of(arguments.folder / "train"), Photographs.of(arguments.folder / "val", arguments.images)
    rows = list(measure(backbone(read_weights(arguments.weights)[0]), train, test, arguments.z))
    print(environment(0))
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".1f"))
    write(arguments.out, rows, seed=0)


if __name__ == "__main__":
    main()
