"""Token merging and its peers written out for one image at a time, with Python lists: nothing here is the code under test.

A reducer takes tokens x (N, C), queries, keys and values (heads, N, D), sizes, places in the dense sequence, and the block's
number among those that reduce; it returns tokens, sizes and places.
"""

from __future__ import annotations

import math

import torch


def merged_by_hand(x, keys, size, r, prefix, *, average=True, places=None, longest=False):
    """Bipartite soft matching of tokens (N, C) by keys (N, D)."""
    unit = [key.detach() / key.detach().norm() for key in keys]
    a, b = range(0, len(x), 2), range(1, len(x), 2)
    best = {i: max((float(unit[i] @ unit[j]), j) for j in b if j >= prefix) for i in a if i >= prefix and len(x) - prefix > 1}
    ranked = sorted(best, key=lambda i: best[i], reverse=True)
    chosen = ranked[: min(r, (len(x) - prefix) // 2)]
    if not chosen:
        return x, size, list(range(len(x)))
    groups = {j: [j] for j in range(len(x)) if j not in chosen}
    for i in chosen:
        groups[best[i][1]].append(i)
    stay = [i for i in a if i >= prefix and i not in chosen]
    if not prefix:
        stay.sort(key=lambda i: best[i], reverse=True)
    order = [*range(prefix), *stay, *(j for j in b if j >= prefix)]
    rows, sizes = [], []
    for j in order:
        members = groups[j] if average else [j]
        total = sum(size[i] for i in members)
        row = sum(x[i] * size[i] for i in members) / total
        rows.append(row / row.norm() * max(x[i].norm() for i in members) if longest else row)
        sizes.append(total)
    return torch.stack(rows), sizes, order


def merging(r, prefix):
    def reduce(x, q, k, v, sizes, places, number):
        x, sizes, _ = merged_by_hand(x, k.mean(0), sizes, r, prefix)
        return x, sizes, None

    return reduce


def fusion(r, prefix, linear_from):
    def reduce(x, q, k, v, sizes, places, number):
        late = number >= linear_from
        x, sizes, _ = merged_by_hand(x, k.mean(0), sizes, r, prefix, average=late, longest=late)
        return x, sizes, None

    return reduce


def weights_of(q, k, sizes):
    """Attention weights (N, N), the mean over heads."""
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + torch.tensor(sizes, dtype=q.dtype).log()
    return logits.softmax(-1).mean(0)


def attention_pruning(r, prefix):
    def reduce(x, q, k, v, sizes, places, number):
        weights = weights_of(q, k, sizes)[0]
        scores = {i: float(weights[i] * math.sqrt(sum(float(v[h, i] @ v[h, i]) for h in range(len(v))))) for i in range(len(x))}
        gone = sorted(range(prefix, len(x)), key=scores.__getitem__)[: min(r, (len(x) - prefix) // 2)]
        stay = [i for i in range(len(x)) if i not in gone]
        return x[stay], [sizes[i] for i in stay], None

    return reduce


def propagation(r, prefix, grid, strength, edges):
    def reduce(x, q, k, v, sizes, places, number):
        count = len(x)
        weights = weights_of(q, k, sizes)
        own = weights.diagonal()
        scores = [float(own[i] * (weights[:, i].sum() - own[i])) for i in range(count)]
        gone = sorted(range(prefix, count), key=scores.__getitem__)[: min(r, (count - prefix) // 2)]
        stay = [i for i in range(count) if i not in gone]
        mean = k.mean(0)
        graph = torch.zeros(count, count, dtype=x.dtype)
        for i in range(prefix, count):
            cosine = {
                j: float(torch.cosine_similarity(mean[i], mean[j], dim=0)) if i != j else 0.0 for j in range(prefix, count)
            }
            for j in sorted(cosine, key=cosine.__getitem__, reverse=True)[:edges]:
                graph[i, j] = max(graph[i, j], cosine[j])
                graph[j, i] = max(graph[j, i], cosine[j])
        for i in range(prefix, count):
            for j in range(prefix, count):
                (a, b), (c, d) = (divmod(places[n] - prefix, grid[1]) for n in (i, j))
                graph[i, j] += max(abs(a - c), abs(b - d)) == 1
        degree = graph.sum(1)
        edge = {
            (i, j): strength * float(graph[i, j] / (degree[i] * degree[j]).sqrt()) if float(graph[i, j]) else 0.0
            for i in stay
            for j in gone
        }
        rows = [x[i] + sum(edge[i, j] * x[j] for j in gone) for i in stay]
        return torch.stack(rows), [sizes[i] + sum(edge[i, j] * sizes[j] for j in gone) for i in stay], [places[i] for i in stay]

    return reduce


def eager(model, image, reduce, blocks, *, keep=None, proportional=True):
    """A `ToyViT` on one image (3, H, W), of whose tokens those at `keep` enter the blocks, reduced behind some attentions."""
    x = model.tokens(image.unsqueeze(0))[0]
    places = list(range(len(x))) if keep is None else list(keep)
    x, sizes, number = x[places], [1.0] * len(places), 0
    for i, block in enumerate(model.blocks):
        heads = block.attn.heads
        n, c = x.shape
        q, k, v = block.attn.qkv(block.norm1(x)).reshape(n, 3, heads, c // heads).permute(1, 2, 0, 3)
        logits = q @ k.transpose(-2, -1) / math.sqrt(c // heads)
        if proportional:
            logits = logits + torch.tensor(sizes, dtype=x.dtype).log()
        x = x + block.attn.proj((logits.softmax(-1) @ v).transpose(0, 1).reshape(n, c))
        if i in blocks:
            x, sizes, places = reduce(x, q, k, v, sizes, places, number)
            number += 1
        x = x + block.mlp(block.norm2(x))
    x = model.norm(x)
    weight = torch.tensor(sizes, dtype=x.dtype).unsqueeze(1)
    match model.shape.pool:
        case "cls":
            return model.head(x[0])
        case "patches":
            first = model.shape.prefix
            return model.head((x * weight)[first:].sum(0) / weight[first:].sum())
        case _:
            return model.head((x * weight).sum(0) / weight.sum())
