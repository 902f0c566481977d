"""Token merging and its peers written out for one image at a time, with Python lists: an oracle that shares no code.

A reducer maps the tokens of an image, and the attention that a block computed from them, to fewer tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .models import Block, ToyViT


@dataclass(frozen=True)
class Tokens:
    """The tokens of one image: content (N, C), the patches each stands for, and its place in the dense sequence."""

    x: Tensor
    sizes: list[float]
    places: list[int]


@dataclass(frozen=True)
class Attended:
    """Queries, keys and values (heads, N, D) of a block, and its number among the blocks that reduce."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    number: int


Reducer = Callable[[Tokens, Attended], Tokens]


@dataclass(frozen=True)
class Eager:
    """A `ToyViT` that reduces its tokens after the attention of some blocks.

    Attributes:
        reduce: How.
        blocks: Numbers of these blocks.
        proportional: Whether attention weighs tokens by size.
    """

    reduce: Reducer
    blocks: Collection[int]
    proportional: bool = True

    def run(self, model: ToyViT, image: Tensor, keep: Sequence[int] | None = None) -> Tensor:
        """The logits of an image (3, H, W); only the tokens at `keep` enter the blocks."""
        x = model.tokens(image.unsqueeze(0))[0]
        places = list(range(len(x))) if keep is None else list(keep)
        tokens, number = Tokens(x[places], [1.0] * len(places), places), 0
        for i, block in enumerate(model.blocks):
            tokens, attended = self._attend(block, tokens, number)
            if i in self.blocks:
                tokens, number = self.reduce(tokens, attended), number + 1
            tokens = replace(tokens, x=tokens.x + block.mlp(block.norm2(tokens.x)))
        x = model.norm(tokens.x)
        weight = torch.tensor(tokens.sizes, dtype=x.dtype).unsqueeze(1)
        match model.shape.pool:
            case "cls":
                return model.head(x[0])
            case "patches":
                first = model.shape.prefix
                return model.head((x * weight)[first:].sum(0) / weight[first:].sum())
            case _:
                return model.head((x * weight).sum(0) / weight.sum())

    def _attend(self, block: Block, tokens: Tokens, number: int) -> tuple[Tokens, Attended]:
        x, heads = tokens.x, block.attn.heads
        n, c = x.shape
        q, k, v = block.attn.qkv(block.norm1(x)).reshape(n, 3, heads, c // heads).permute(1, 2, 0, 3)
        logits = q @ k.transpose(-2, -1) / math.sqrt(c // heads)
        if self.proportional:
            logits = logits + torch.tensor(tokens.sizes, dtype=x.dtype).log()
        mixed = block.attn.proj((logits.softmax(-1) @ v).transpose(0, 1).reshape(n, c))
        return replace(tokens, x=x + mixed), Attended(q, k, v, number)


def merging(r: int, prefix: int) -> Reducer:
    """Token merging: a merged token is the average of its members, weighted by size."""
    return lambda tokens, attended: _combine(tokens, _groups(tokens, attended, r, prefix), _average)


def fusion(r: int, prefix: int, linear_from: int) -> Reducer:
    """Token fusion: drops tokens in the first blocks, then merges them, with the norm of the longest member."""

    def reduce(tokens: Tokens, attended: Attended) -> Tokens:
        groups = _groups(tokens, attended, r, prefix)
        if attended.number < linear_from:
            return _pick(tokens, [members[0] for members in groups])
        return _combine(tokens, groups, _longest)

    return reduce


def attention_pruning(r: int, prefix: int) -> Reducer:
    """Drops the patches with the lowest attention of the class token times norm of the value."""

    def reduce(tokens: Tokens, attended: Attended) -> Tokens:
        v = attended.values
        weights = _attention(attended, tokens.sizes)[0]
        norms = [math.sqrt(sum(float(v[h, i] @ v[h, i]) for h in range(len(v)))) for i in range(len(tokens.x))]
        stay, _ = _split([float(weight) * norm for weight, norm in zip(weights, norms, strict=True)], r, prefix)
        return _pick(tokens, stay)

    return reduce


def propagation(r: int, prefix: int, grid: tuple[int, int], strength: float, edges: int) -> Reducer:
    """Drops patches and adds a share of each to its neighbours, over a graph of touching cells and of like keys."""

    def reduce(tokens: Tokens, attended: Attended) -> Tokens:
        weights = _attention(attended, tokens.sizes)
        own = weights.diagonal()
        count = len(tokens.x)
        stay, gone = _split([float(own[i] * (weights[:, i].sum() - own[i])) for i in range(count)], r, prefix)
        graph = _like(attended.keys.mean(0), prefix, edges) + _touching(tokens.places, prefix, grid).to(tokens.x.dtype)
        degree = graph.sum(1)
        share = {
            (i, j): strength * float(graph[i, j] / (degree[i] * degree[j]).sqrt()) if float(graph[i, j]) else 0.0
            for i in stay
            for j in gone
        }
        rows = [tokens.x[i] + sum(share[i, j] * tokens.x[j] for j in gone) for i in stay]
        sizes = [tokens.sizes[i] + sum(share[i, j] * tokens.sizes[j] for j in gone) for i in stay]
        return Tokens(torch.stack(rows), sizes, [tokens.places[i] for i in stay])

    return reduce


def _groups(tokens: Tokens, attended: Attended, r: int, prefix: int) -> list[list[int]]:
    """Bipartite soft matching: the tokens that stay, in their new order, each with those that are merged into it."""
    count = len(tokens.x)
    unit = [key / key.norm() for key in attended.keys.mean(0).detach()]
    first, second = [i for i in range(0, count, 2) if i >= prefix], [j for j in range(1, count, 2) if j >= prefix]
    best = {i: max((float(unit[i] @ unit[j]), j) for j in second) for i in first if second}
    ranked = sorted(best, key=lambda i: best[i], reverse=True)
    chosen = ranked[: min(r, (count - prefix) // 2)]
    if not chosen:
        return [[i] for i in range(count)]
    stay = [i for i in first if i not in chosen]
    if not prefix:
        stay.sort(key=lambda i: best[i], reverse=True)
    return [[j, *(i for i in chosen if best[i][1] == j)] for j in (*range(prefix), *stay, *second)]


def _combine(tokens: Tokens, groups: list[list[int]], join: Callable[[Tokens, list[int]], Tensor]) -> Tokens:
    sizes = [sum(tokens.sizes[i] for i in members) for members in groups]
    return Tokens(torch.stack([join(tokens, members) for members in groups]), sizes, [])


def _average(tokens: Tokens, members: list[int]) -> Tensor:
    return sum(tokens.x[i] * tokens.sizes[i] for i in members) / sum(tokens.sizes[i] for i in members)


def _longest(tokens: Tokens, members: list[int]) -> Tensor:
    """The average, scaled to the norm of the longest member."""
    row = _average(tokens, members)
    return row / row.norm() * max(tokens.x[i].norm() for i in members)


def _pick(tokens: Tokens, stay: list[int]) -> Tokens:
    return Tokens(tokens.x[stay], [tokens.sizes[i] for i in stay], [tokens.places[i] for i in stay if tokens.places])


def _attention(attended: Attended, sizes: list[float]) -> Tensor:
    """Attention weights (N, N), the mean over heads."""
    q, k = attended.queries, attended.keys
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + torch.tensor(sizes, dtype=q.dtype).log()
    return logits.softmax(-1).mean(0)


def _split(scores: list[float], r: int, prefix: int) -> tuple[list[int], list[int]]:
    """The tokens that stay, in order, and the r patches with the lowest scores, at most half of all."""
    count = len(scores)
    gone = sorted(range(prefix, count), key=scores.__getitem__)[: min(r, (count - prefix) // 2)]
    return [i for i in range(count) if i not in gone], gone


def _like(keys: Tensor, prefix: int, edges: int) -> Tensor:
    """Each patch is connected to the `edges` patches of highest positive cosine, in both directions."""
    count = len(keys)
    graph = torch.zeros(count, count, dtype=keys.dtype)
    for i in range(prefix, count):
        cosine = {j: float(torch.cosine_similarity(keys[i], keys[j], dim=0)) if i != j else 0.0 for j in range(prefix, count)}
        for j in sorted(cosine, key=cosine.__getitem__, reverse=True)[:edges]:
            graph[i, j] = max(graph[i, j], cosine[j])
            graph[j, i] = max(graph[j, i], cosine[j])
    return graph


def _touching(places: list[int], prefix: int, grid: tuple[int, int]) -> Tensor:
    """Whether the cells of two patches touch, at a side or a corner."""
    cells = {i: divmod(place - prefix, grid[1]) for i, place in enumerate(places) if i >= prefix}
    graph = torch.zeros(len(places), len(places))
    for i, (a, b) in cells.items():
        for j, (c, d) in cells.items():
            graph[i, j] = max(abs(a - c), abs(b - d)) == 1
    return graph
