"""A coarse background written out for the toy ViTs: one sample at a time, with loops over quads."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from .models import ToyViT
from .models.positioned import Biased, Rotary
from .oracles import count_by_hand

Groups = list[list[int]]


def quads_by_hand(grid: tuple[int, ...]) -> Groups:
    """The patches of each quad, each once, in order."""
    frames, rows, columns = grid if len(grid) == 3 else (1, *grid)
    places: dict[tuple[int, int, int], list[int]] = {}
    for t, r, c in product(range(frames), range(rows), range(columns)):
        places.setdefault((t, r // 2, c // 2), []).append((t * rows + r) * columns + c)
    return [places[key] for key in sorted(places)]


def chosen_by_hand(scores: list[float], grid: tuple[int, ...], z: float, others: int) -> tuple[list[int], list[int]]:
    """Fine patches and coarse quads, by a sort."""
    quads, k = quads_by_hand(grid), count_by_hand(len(scores), z, others)
    means = [sum(scores[i] for i in quad) / len(quad) for quad in quads]
    best = sorted(range(len(quads)), key=lambda q: -means[q])
    if k < len(quads):
        return [], sorted(best[:k])
    fine = [q for q in best if len(quads[q]) == 4][: (k - len(quads)) // 3]
    return sorted(i for q in fine for i in quads[q]), [q for q in range(len(quads)) if q not in fine]


def groups_by_hand(psm: Tensor, z: float, others: int) -> Groups:
    """The patches that each kept token stands for, of one map: fine patches first."""
    fine, coarse = chosen_by_hand(psm.flatten().tolist(), tuple(psm.shape), z, others)
    quads = quads_by_hand(tuple(psm.shape))
    return [[i] for i in fine] + [quads[q] for q in coarse]


def coarse_by_hand(model: ToyViT, maps: Tensor, x: Tensor, z: float) -> Tensor:
    """The model's output with a coarse background. `maps` (B, h, w) are the significance, resized to the grid."""
    results = []
    for sample, psm in zip(x, maps, strict=True):
        groups = groups_by_hand(psm, z, model.shape.prefix)
        tokens = torch.cat([_token(model, sample, group) for group in groups], 1)
        tokens = torch.cat([(model.first + model.pos[:, : model.shape.prefix]), tokens], 1)
        for block in model.blocks:
            tokens = tokens + _attended(block.attn, block.norm1(tokens), groups, model.shape.prefix)
            tokens = tokens + block.mlp(block.norm2(tokens))
        results.append(model.classify(tokens))
    return torch.cat(results)


def _token(model: ToyViT, sample: Tensor, group: list[int]) -> Tensor:
    """The token of one patch, or of a quad: its pixels at half size, with the mean of the positions."""
    (height, width), columns = model.shape.patch, model.shape.grid[1]
    rows_of, columns_of = sorted({i // columns for i in group}), sorted({i % columns for i in group})
    pixels = sample[:, rows_of[0] * height : (rows_of[-1] + 1) * height, columns_of[0] * width : (columns_of[-1] + 1) * width]
    patch = F.adaptive_avg_pool2d(pixels, (height, width))[None]
    return model.patches(patch) + model.pos[:, [model.shape.prefix + i for i in group]].mean(1, keepdim=True)


def _attended(attention: torch.nn.Module, x: Tensor, groups: Groups, prefix: int) -> Tensor:
    """Attention over tokens (1, N, C) that stand for groups of positions: position tables are averaged over these."""
    b, n, c = x.shape
    q, k, v = attention.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
    bias: Tensor | float = 0.0
    if isinstance(attention, Rotary):
        q, k = (_turned(attention, value, groups, prefix) for value in (q, k))
    elif isinstance(attention, Biased):
        whole = [[i] for i in range(prefix)] + [[prefix + i for i in group] for group in groups]
        table = attention.bias()[0]
        bias = torch.stack([torch.stack([table[:, one][:, :, other].mean((1, 2)) for other in whole], -1) for one in whole], 1)
    weights = (q @ k.transpose(-2, -1) * (c // 2) ** -0.5 + bias).softmax(-1)
    return attention.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


def _turned(attention: Rotary, value: Tensor, groups: Groups, prefix: int) -> Tensor:
    cosine, sine = (
        torch.stack([table[group].mean(0) for group in groups]) for table in (attention.angles.cos(), attention.angles.sin())
    )
    rest = value[:, :, prefix:]
    return torch.cat([value[:, :, :prefix], rest * cosine + rest.flip(-1) * sine], 2)
