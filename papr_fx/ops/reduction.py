"""The functions that a graph with token merging, or one of its peers, calls: each is one node there.

Of N tokens, the first `prefix` and the last `suffix` are never merged or dropped. Of the others, those at even places of the
sequence form set A, those at odd places set B (Bolya et al., ICLR 2023, Sec. 3.2).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .positions import ascending, gather_tokens, wide, with_suffix


class Matching(NamedTuple):
    """Which tokens are merged into which.

    Attributes:
        stay: Places of the tokens that stay, in their new order: prefix, A, B, suffix; (B, N - r).
        merged: Places of the tokens of A that are merged, (B, r).
        into: For each of these, the new place of the token that it is merged into, (B, r).
    """

    stay: Tensor
    merged: Tensor
    into: Tensor


def match_tokens(keys: Tensor, r: int, prefix: int, suffix: int = 0) -> Matching:
    """Bipartite soft matching: merges the r tokens of A that are most like a token of B (Bolya et al., ICLR 2023, Sec. 3.2).

    Args:
        keys: Keys of the attention, (B, heads, N, D). Likeness is the cosine of their means over heads.
        r: Number of tokens to merge, capped at half of the patches.
        prefix: Number of class, distillation and register tokens.
        suffix: Number of tokens behind the patches.

    Returns:
        The matching. With prefix tokens, the rest of A keeps its order; without, it is sorted by descending score.
    """
    count = keys.shape[2] - suffix
    metric = F.normalize(keys[:, :, :count].mean(1, dtype=wide(keys)), dim=-1)  # (B, N - suffix, D)
    first, second = prefix + prefix % 2, prefix + 1 - prefix % 2  # the first patches at an even and at an odd place
    r = min(r, (count - prefix) // 2)
    places = torch.arange(keys.shape[2], device=keys.device).expand(keys.shape[0], -1)
    if not r:
        return Matching(places, places[:, :0], places[:, :0])
    places, behind = places[:, :count], places[:, count:]
    with exact(keys):
        scores = metric[:, first::2] @ metric[:, second::2].transpose(1, 2)  # (B, |A|, |B|)
    best, partner = scores.max(dim=-1)
    order = best.topk(best.shape[1], dim=-1).indices
    merged, unmerged = order[:, :r], order[:, r:]
    if prefix:
        unmerged = ascending(unmerged)
    stay = torch.cat([places[:, :prefix], first + 2 * unmerged, places[:, second::2], behind], dim=1)
    return Matching(stay, first + 2 * merged, prefix + unmerged.shape[1] + partner.gather(1, merged))


def merge_tokens(tokens: Tensor, sizes: Tensor | None, matching: Matching) -> tuple[Tensor, Tensor]:
    """Averages matched tokens, weighted by size (Bolya et al., ICLR 2023, Sec. 3.2).

    Args:
        tokens: (B, N, C).
        sizes: How many patches each token stands for, (B, N); None for 1.
        matching: From `match_tokens`.

    Returns:
        Tokens (B, N - r, C) and their sizes (B, N - r), float32 or wider.
    """
    stay, merged, into = matching
    if sizes is None:
        sizes = torch.ones_like(tokens[:, :, 0], dtype=wide(tokens))
    # A matrix product sums in a fixed order, by one kernel, in half precision too. Shares are 1 at most: sums of tokens times
    # sizes would overflow float16.
    members = torch.arange(stay.shape[1], device=into.device).view(1, -1, 1) == into.unsqueeze(1)  # (B, N - r, r)
    own, added = sizes.gather(1, stay), members * sizes.gather(1, merged).unsqueeze(1)
    sizes = own + added.sum(-1)
    share = (own / sizes).unsqueeze(-1).to(tokens.dtype)
    mixed = (added / sizes.unsqueeze(-1)).to(tokens.dtype) @ gather_tokens(tokens, merged)
    return gather_tokens(tokens, stay) * share + mixed, sizes


def size_bias(sizes: Tensor, keys: Tensor, suffix: int = 0) -> Tensor:
    """Proportional attention: the bias (B, 1, 1, n) of logits for keys (B, heads, n, D), from n of sizes (B, N)."""
    return last_sizes(sizes, keys.shape[-2], suffix).log().to(keys.dtype)[:, None, None]


def mean_by_size(
    tokens: Tensor, axis: int, sizes: Tensor, keepdim: bool = False, dtype: torch.dtype | None = None, *, suffix: int = 0
) -> Tensor:
    """The mean over `axis` of (B, n, C) or (B, C, n), weighted by n of sizes (B, N): see `last_sizes`."""
    weights = last_sizes(sizes, tokens.shape[axis], suffix)
    weights = (weights / weights.sum(1, keepdim=True)).to(dtype or tokens.dtype)
    weights = weights.unsqueeze(-1) if axis == 1 else weights.unsqueeze(1)
    return (tokens.to(weights.dtype) * weights).sum(axis, keepdim=keepdim)


def last_sizes(sizes: Tensor, count: int, suffix: int = 0) -> Tensor:
    """The sizes of `count` of (B, N) tokens: all, or else patches, the last ones before `suffix` tokens.

    Raises:
        ValueError: There are fewer: the tokens were computed before a reduction.
    """
    if count > sizes.shape[1]:
        raise ValueError(f"the {count} tokens were computed before a reduction, which left {sizes.shape[1]}")
    end = sizes.shape[1] - (suffix if count < sizes.shape[1] else 0)
    return sizes[:, end - count : end]


def exact(tensor: Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off on the tensor's device, so that scores are compared at full precision."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def split_heads(projected: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Splits one projection (B, N, 3 * heads * D) into queries, keys and values (B, heads, N, D)."""
    queries, keys, values = projected.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return queries, keys, values


def join_heads(mixed: Tensor) -> Tensor:
    """Joins the heads of (B, heads, N, D): (B, N, heads * D)."""
    return mixed.transpose(1, 2).flatten(2)


def fuse_tokens(tokens: Tensor, sizes: Tensor | None, matching: Matching) -> tuple[Tensor, Tensor]:
    """Like `merge_tokens`, but a merged token gets the norm of its longest member (MLERP; Kim et al., WACV 2024, Sec. 3)."""
    lengths = tokens.norm(dim=-1)  # (B, N)
    longest = lengths.gather(1, matching.stay)
    longest = longest.scatter_reduce(1, matching.into, lengths.gather(1, matching.merged), "amax")
    means, sizes = merge_tokens(tokens, sizes, matching)
    return F.normalize(means, dim=-1) * longest.unsqueeze(-1), sizes


def attention_weights(queries: Tensor, keys: Tensor, sizes: Tensor | None, scale: float | None) -> Tensor:
    """Attention weights (B, M, N) of queries (B, heads, M, D) for keys (B, heads, N, D): their mean over heads, in float32."""
    dtype = wide(keys)
    with exact(keys):
        logits = (queries.to(dtype) @ keys.to(dtype).transpose(-2, -1)) * (keys.shape[-1] ** -0.5 if scale is None else scale)
    return (logits if sizes is None else logits + size_bias(sizes, logits)).softmax(dim=-1).mean(1)


def most_attended(
    queries: Tensor, keys: Tensor, values: Tensor, r: int, prefix: int, scale: float | None, suffix: int = 0
) -> Tensor:
    """Drops the r patches that the class token attends to least: weight times norm of the value (Fayyaz et al., ECCV 2022).

    Args:
        queries: (B, heads, N, D), as are `keys` and `values`.
        keys: Keys of the attention.
        values: Values of the attention.
        r: Number of patches to drop, capped at half of them.
        prefix: Number of prefix tokens, at least 1; the first is the class token.
        scale: Factor of the logits; None for 1 / sqrt(D).
        suffix: Number of tokens behind the patches.

    Returns:
        Places of the tokens that stay, in order, (B, N - r).
    """
    weights = attention_weights(queries[:, :, :1], keys, None, scale).squeeze(1)  # (B, N)
    lengths = values.to(weights.dtype).norm(dim=(1, 3))  # over heads and channels
    return split_by_score((weights * lengths)[:, prefix : keys.shape[2] - suffix], r, prefix, suffix)[0]


def split_by_score(scores: Tensor, r: int, prefix: int, suffix: int = 0) -> tuple[Tensor, Tensor]:
    """Places of the tokens that stay, in order, (B, N - r), and of the r patches with the lowest scores, (B, r)."""
    batch, patches = scores.shape
    order = scores.topk(patches, dim=-1, largest=False).indices
    r = min(r, patches // 2)
    first = torch.arange(prefix, device=scores.device).expand(batch, prefix)
    stay = torch.cat([first, prefix + ascending(order[:, r:])], dim=1)
    return with_suffix(stay, prefix + patches, suffix) if suffix else stay, prefix + order[:, :r]


def choose_tokens(
    queries: Tensor, keys: Tensor, sizes: Tensor | None, r: int, prefix: int, scale: float | None, suffix: int = 0
) -> tuple[Tensor, Tensor]:
    """Drops the r patches with the lowest product of self-attention and attention by others (Xu et al., WACV 2024, Sec. 3).

    Self-attention says how hard a token is to regenerate from others, attention by others how much it passes on.

    Args:
        queries: (B, heads, N, D).
        keys: (B, heads, N, D).
        sizes: How much each token stands for, (B, N); None for 1.
        r: Number of patches to drop, capped at half of them.
        prefix: Number of prefix tokens.
        scale: Factor of the logits; None for 1 / sqrt(D).
        suffix: Number of tokens behind the patches.

    Returns:
        Places of the tokens that stay, (B, N - r), and of the patches that are dropped, (B, r).
    """
    weights = attention_weights(queries, keys, sizes, scale)  # (B, N, N)
    own = (weights * torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)).sum(-1)
    scores = own * (weights.sum(1) - own)
    return split_by_score(scores[:, prefix : keys.shape[2] - suffix], r, prefix, suffix)


def neighbour_graph(
    keys: Tensor, places: Tensor | None, grid: tuple[int, ...], prefix: int, edges: int, suffix: int = 0
) -> Tensor:
    """The weights of a graph over tokens: patches that touch in the image, and patches with like keys (Xu et al., WACV 2024).

    Args:
        keys: (B, heads, N, D). Likeness is the cosine of their means over heads.
        places: The place of each token in the dense sequence, (B, N); None if all are there.
        grid: Sizes of the patches' grid.
        prefix: Number of prefix tokens, which have no neighbours.
        edges: Number of neighbours with like keys that each token chooses.
        suffix: Number of tokens behind the patches, which have none either.

    Returns:
        Symmetric weights (B, N, N), normalised by degree: D^-1/2 A D^-1/2.
    """
    patches = slice(prefix, keys.shape[2] - suffix)
    if places is None:
        places = torch.arange(keys.shape[2], device=keys.device).expand(keys.shape[0], keys.shape[2])
    cells = torch.stack(unravel(places[:, patches] - prefix, grid), dim=-1)  # (B, n, axes)
    touching = (cells.unsqueeze(2) - cells.unsqueeze(1)).abs().amax(-1) == 1  # (B, n, n)
    metric = F.normalize(keys[:, :, patches].mean(1, dtype=wide(keys)), dim=-1)
    itself = torch.eye(metric.shape[1], dtype=torch.bool, device=metric.device)
    with exact(keys):
        alike = (metric @ metric.transpose(1, 2)).masked_fill(itself, 0)
    best = alike.topk(min(edges, alike.shape[-1]), dim=-1)
    alike = torch.zeros_like(alike).scatter(-1, best.indices, best.values.clamp(min=0))
    weights = torch.maximum(alike, alike.transpose(1, 2)) + touching  # symmetric
    root = weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny).rsqrt()
    return F.pad(weights * root * root.transpose(1, 2), (prefix, suffix, prefix, suffix))


def propagate_tokens(
    tokens: Tensor, sizes: Tensor | None, chosen: tuple[Tensor, Tensor], weights: Tensor, strength: float
) -> tuple[Tensor, Tensor]:
    """Adds a share of each dropped token to its neighbours that stay (Xu et al., WACV 2024, Sec. 3).

    Args:
        tokens: (B, N, C).
        sizes: How much each token stands for, (B, N); None for 1.
        chosen: From `choose_tokens`, places that stay and places that are dropped.
        weights: From `neighbour_graph`, (B, N, N).
        strength: The share that is passed on.

    Returns:
        Tokens (B, N - r, C) and their sizes (B, N - r), float32 or wider.
    """
    stay, drop = chosen
    if sizes is None:
        sizes = torch.ones_like(tokens[:, :, 0], dtype=wide(tokens))
    share = gather_tokens(weights, stay).gather(2, drop.unsqueeze(1).expand(-1, stay.shape[1], -1))  # (B, N - r, r)
    share = strength * share
    fewer = gather_tokens(tokens, stay) + share.to(tokens.dtype) @ gather_tokens(tokens, drop)
    return fewer, sizes.gather(1, stay) + (share * sizes.gather(1, drop).unsqueeze(1)).sum(-1)


def unravel(cells: Tensor, grid: tuple[int, ...]) -> list[Tensor]:
    """The coordinates of cells, one tensor per axis; cells are numbered in row-major order."""
    found: list[Tensor] = []
    for size in reversed(grid):
        found.insert(0, cells % size)
        cells = cells // size
    return found
