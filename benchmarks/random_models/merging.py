"""Bipartite soft matching (Bolya et al., ICLR 2023) written out with loops: the oracle of `papr_fx.Merge`."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .views import View


def merged(x: Tensor, keys: Tensor, view: View) -> tuple[Tensor, View]:
    """Merges `view.merge` tokens of each sample, after an attention with keys (B, H, K, D)."""
    if not view.merge:
        return x, view
    sizes = torch.ones_like(x[..., 0]) if view.sizes is None else view.sizes
    shares = torch.stack([_shares(*sample, view) for sample in zip(keys, sizes, strict=True)])  # (B, K', K), of sizes
    after = shares.sum(2)
    means = shares / after.unsqueeze(2)
    return means @ x, replace(view, take=means @ view.take, sizes=after)


def _shares(keys: Tensor, sizes: Tensor, view: View) -> Tensor:
    """Which tokens make each new one, by their sizes, (K', K)."""
    count = keys.shape[1]
    likeness = F.normalize(keys.mean(0), dim=-1)
    likeness = likeness @ likeness.T
    patches = range(view.prefix, count - view.suffix)
    even, odd = [i for i in patches if i % 2 == 0], [i for i in patches if i % 2]
    partners = {i: max(odd, key=lambda j: float(likeness[i, j])) for i in even} if odd else {}
    order = sorted(partners, key=lambda i: -float(likeness[i, partners[i]]))
    amount = min(view.merge, len(patches) // 2)
    gone, rest = order[:amount], order[amount:]
    if not odd:
        rest = even
    stay = [*range(view.prefix), *(sorted(rest) if view.prefix else rest), *odd, *range(count - view.suffix, count)]
    shares = torch.zeros(len(stay), count, dtype=sizes.dtype)
    for row, i in enumerate(stay):
        for j in [i, *(j for j in gone if partners[j] == i)]:
            shares[row, j] = sizes[j]
    return shares
