"""The functions that a graph with token merging, or a peer of it, calls: each is one node there.

Counts are Python integers and no content is read on the host, as in `ops`. Of N tokens the first `prefix` stay in their
places; patches at even places of the whole sequence are set A, those at odd places set B (Bolya et al., ICLR 2023, Sec. 3.2).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .positions import gather_tokens


class Matching(NamedTuple):
    """Which tokens are merged into which.

    Attributes:
        stay: The tokens that stay, by their place, in their new order: prefix, those of A, those of B; (B, N - r).
        merged: Those of A that are merged, (B, r).
        into: The new place of the token that each is merged into, (B, r).
    """

    stay: Tensor
    merged: Tensor
    into: Tensor


def match_tokens(keys: Tensor, r: int, prefix: int) -> Matching:
    """Bipartite soft matching: the r tokens of A with the best match are merged into it (Bolya et al., ICLR 2023, Sec. 3.2).

    Args:
        keys: Keys of the attention, (B, heads, N, D); their mean over heads, at unit length, is compared.
        r: Tokens to merge; at most half of the patches are.
        prefix: Tokens that stay: class, distillation and register tokens.

    Returns:
        The matching. What stays of A keeps its order behind prefix tokens, and goes by descending score without.
    """
    metric = F.normalize(keys.mean(1, dtype=wide(keys)), dim=-1)  # (B, N, D)
    count = metric.shape[1]
    first, second = prefix + prefix % 2, prefix + 1 - prefix % 2  # the first patches at an even and at an odd place
    r = min(r, (count - prefix) // 2)
    places = torch.arange(count, device=keys.device).expand(keys.shape[0], count)
    if not r:
        return Matching(places, places[:, :0], places[:, :0])
    with exact(keys):
        scores = metric[:, first::2] @ metric[:, second::2].transpose(1, 2)  # (B, |A|, |B|)
    best, partner = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    merged, unmerged = order[:, :r], order[:, r:]
    if prefix:
        unmerged = unmerged.sort(dim=-1).values
    stay = torch.cat([places[:, :prefix], first + 2 * unmerged, places[:, second::2]], dim=1)
    return Matching(stay, first + 2 * merged, prefix + unmerged.shape[1] + partner.gather(1, merged))


def merge_tokens(tokens: Tensor, sizes: Tensor | None, matching: Matching) -> tuple[Tensor, Tensor]:
    """Averages matched tokens, weighted by size (Bolya et al., ICLR 2023, Sec. 3.2).

    Args:
        tokens: (B, N, C).
        sizes: Patches that each stands for, (B, N); None if each stands for itself.
        matching: Of these tokens, r of them merged.

    Returns:
        Tokens (B, N - r, C) and their sizes (B, N - r), float32 or wider.
    """
    stay, merged, into = matching
    if sizes is None:
        sizes = torch.ones_like(tokens[:, :, 0], dtype=wide(tokens))
    # A product, as tokens are summed in half precision by one kernel then, and in a fixed order. Shares are 1 at most: sums of
    # weighted tokens would not fit float16.
    members = torch.arange(stay.shape[1], device=into.device).view(1, -1, 1) == into.unsqueeze(1)  # (B, N - r, r)
    own, added = sizes.gather(1, stay), members * sizes.gather(1, merged).unsqueeze(1)
    sizes = own + added.sum(-1)
    share = (own / sizes).unsqueeze(-1).to(tokens.dtype)
    mixed = (added / sizes.unsqueeze(-1)).to(tokens.dtype) @ gather_tokens(tokens, merged)
    return gather_tokens(tokens, stay) * share + mixed, sizes


def size_bias(sizes: Tensor, keys: Tensor) -> Tensor:
    """The sizes (B, N) of keys (B, heads, n, D), the last n, as a bias (B, 1, 1, n) of logits: proportional attention."""
    return last_sizes(sizes, keys.shape[-2]).log().to(keys.dtype)[:, None, None]


def mean_by_size(tokens: Tensor, axis: int, sizes: Tensor, keepdim: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """The mean over `axis` of (B, n, C) or (B, C, n), each of the n tokens weighted by its size, the last n of (B, N)."""
    weights = last_sizes(sizes, tokens.shape[axis])
    weights = (weights / weights.sum(1, keepdim=True)).to(dtype or tokens.dtype)
    weights = weights.unsqueeze(-1) if axis == 1 else weights.unsqueeze(1)
    return (tokens.to(weights.dtype) * weights).sum(axis, keepdim=keepdim)


def last_sizes(sizes: Tensor, count: int) -> Tensor:
    """The last `count` sizes of (B, N).

    Raises:
        ValueError: There are fewer: the tokens are from before a reduction.
    """
    if count > sizes.shape[1]:
        raise ValueError(f"{count} tokens from before a reduction, of which {sizes.shape[1]} were left")
    return sizes[:, sizes.shape[1] - count :]


def wide(tensor: Tensor) -> torch.dtype:
    """float32, or the tensor's own dtype if that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def exact(tensor: Tensor) -> AbstractContextManager[Any]:
    """No autocast on the tensor's device: what is compared is compared at full precision."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def split_heads(projected: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (B, heads, N, D) each, of one projection (B, N, 3 * heads * D)."""
    queries, keys, values = projected.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return queries, keys, values


def join_heads(mixed: Tensor) -> Tensor:
    """(B, heads, N, D) to (B, N, heads * D)."""
    return mixed.transpose(1, 2).flatten(2)


def fuse_tokens(tokens: Tensor, sizes: Tensor | None, matching: Matching) -> tuple[Tensor, Tensor]:
    """As `merge_tokens`, but a merged token is as long as its longest member (MLERP; Kim et al., WACV 2024, Sec. 3)."""
    lengths = tokens.norm(dim=-1)  # (B, N)
    longest = lengths.gather(1, matching.stay)
    longest = longest.scatter_reduce(1, matching.into, lengths.gather(1, matching.merged), "amax")
    means, sizes = merge_tokens(tokens, sizes, matching)
    return F.normalize(means, dim=-1) * longest.unsqueeze(-1), sizes


def attention_weights(queries: Tensor, keys: Tensor, sizes: Tensor | None, scale: float | None) -> Tensor:
    """Weights (B, M, N) of queries (B, heads, M, D) for keys (B, heads, N, D), as a mean over heads, float32 or wider."""
    dtype = wide(keys)
    with exact(keys):
        logits = (queries.to(dtype) @ keys.to(dtype).transpose(-2, -1)) * (keys.shape[-1] ** -0.5 if scale is None else scale)
    return (logits if sizes is None else logits + size_bias(sizes, logits)).softmax(dim=-1).mean(1)


def most_attended(queries: Tensor, keys: Tensor, values: Tensor, r: int, prefix: int, scale: float | None) -> Tensor:
    """All but the r patches that the first token attends to least, by weight and length of value (Fayyaz et al., ECCV 2022).

    Args:
        queries: (B, heads, N, D), as are `keys` and `values`.
        keys: Of the attention.
        values: Of the attention.
        r: Patches to leave out; at most half of them are.
        prefix: Tokens that stay, 1 at least.
        scale: What logits are multiplied with; None for the root of D.

    Returns:
        Places of the others, in order, (B, N - r).
    """
    weights = attention_weights(queries[:, :, :1], keys, None, scale).squeeze(1)  # (B, N)
    lengths = values.to(weights.dtype).norm(dim=(1, 3))  # over heads and channels
    return split_by_score((weights * lengths)[:, prefix:], r, prefix)[0]


def split_by_score(scores: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Places of the tokens that stay, prefix first and in order, (B, N - r), and of the r patches of least score, (B, r)."""
    batch, patches = scores.shape
    order = scores.argsort(dim=-1)
    r = min(r, patches // 2)
    first = torch.arange(prefix, device=scores.device).expand(batch, prefix)
    return torch.cat([first, prefix + order[:, r:].sort(dim=-1).values], dim=1), prefix + order[:, :r]


def choose_tokens(
    queries: Tensor, keys: Tensor, sizes: Tensor | None, r: int, prefix: int, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Tokens that stay, (B, N - r), and patches that go, (B, r): of least self-attention times attention by others.

    Xu et al., WACV 2024, Sec. 3: how hard a token is to regenerate from others, and how much it broadcasts to them.
    """
    weights = attention_weights(queries, keys, sizes, scale)  # (B, N, N)
    own = (weights * torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)).sum(-1)
    scores = own * (weights.sum(1) - own)
    return split_by_score(scores[:, prefix:], r, prefix)


def propagate_tokens(
    tokens: Tensor,
    keys: Tensor,
    sizes: Tensor | None,
    chosen: tuple[Tensor, Tensor],
    places: Tensor | None,
    grid: tuple[int, ...],
    prefix: int,
    strength: float,
    edges: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds to tokens that stay a share of their neighbours that go (Xu et al., WACV 2024, Sec. 3).

    Args:
        tokens: (B, N, C).
        keys: (B, heads, N, D); those of like mean over heads are neighbours.
        sizes: How much each token stands for, (B, N); None for 1.
        chosen: From `choose_tokens`.
        places: The place of each token in the dense sequence, (B, N); None where all are there.
        grid: Sizes of the patches' grid; cells that touch are neighbours.
        prefix: Tokens without neighbours.
        strength: Share that is handed on.
        edges: Neighbours of like keys of each token.

    Returns:
        Tokens (B, N - r, C), their sizes (B, N - r) and places (B, N - r).
    """
    stay, drop = chosen
    batch, count = tokens.shape[:2]
    if places is None:
        places = torch.arange(count, device=tokens.device).expand(batch, count)
    if sizes is None:
        sizes = torch.ones((batch, count), dtype=wide(tokens), device=tokens.device)
    patches = slice(prefix, None)
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
    weights = F.pad(weights * root * root.transpose(1, 2), (prefix, 0, prefix, 0))  # (B, N, N)
    share = gather_tokens(weights, stay).gather(2, drop.unsqueeze(1).expand(-1, stay.shape[1], -1))  # (B, N - r, r)
    share = strength * share
    fewer = gather_tokens(tokens, stay) + share.to(tokens.dtype) @ gather_tokens(tokens, drop)
    grown = sizes.gather(1, stay) + (share * sizes.gather(1, drop).unsqueeze(1)).sum(-1)
    return fewer, grown, places.gather(1, stay)


def unravel(cells: Tensor, grid: tuple[int, ...]) -> list[Tensor]:
    """The coordinates of cells that are counted in row-major order, axis by axis."""
    found: list[Tensor] = []
    for size in reversed(grid):
        found.insert(0, cells % size)
        cells = cells // size
    return found
