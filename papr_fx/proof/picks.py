"""Which tokens a reduction merges or drops: the definitions of its papers, in other words than those of `papr_fx.ops`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..errors import VerifyError
from ..ops import choose_tokens, match_tokens, most_attended, neighbour_graph
from ..tracing.graphs import cut, leaves_of
from .case import Case, ComparisonError


def check(case: Case) -> None:
    """Runs the module's own graph on two images, and looks at each call that picks tokens, given what it got there.

    Raises:
        ComparisonError: It picks others. In float32 two may be alike but for rounding.
        VerifyError: It looks at something else than the block's attention does.
    """
    graph = case.own_graph
    calls = [node for node in graph.nodes if node.target in _PICKS]
    attended = {node.args[:3] for node in graph.nodes if node.target is F.scaled_dot_product_attention}
    needed = dict.fromkeys(leaf for node in calls for leaf in (*leaves_of(node.args), node) if isinstance(leaf, fx.Node))
    values = dict(zip(needed, case.run(cut(case.root, graph, *needed), case.images), strict=True))
    for node in calls:
        given = cast("tuple[Any, ...]", node.args)
        asked = given[: _READS[node.target]]
        if not any(asked == parts[: len(asked)] or asked == parts[1:2] for parts in attended):
            raise VerifyError(f"merging: `{node.name}` looks at {asked}, which no attention has as queries, keys and values")
        arguments = fx.map_arg(given, lambda leaf: values[leaf])
        if not _PICKS[node.target](values[node], *arguments):
            raise ComparisonError(f"merging: `{node.name}` picks other tokens than `{node.target.__name__}` says")


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two scores are equal up to rounding."""
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max()) if a.numel() else True


def _matches(found: Any, keys: Tensor, r: int, prefix: int, suffix: int = 0) -> bool:
    """Bipartite soft matching (Bolya et al., ICLR 2023, Sec. 3.2): even places to odd ones, the r most alike."""
    stay, merged, into = found
    total, count = keys.shape[2], keys.shape[2] - suffix
    mean = keys.double().mean(1)[:, :count]
    unit = mean / mean.square().sum(-1, keepdim=True).sqrt()
    likeness = torch.einsum("bnd,bmd->bnm", unit, unit)
    even = [place for place in range(prefix, count) if place % 2 == 0]
    odd = [place for place in range(prefix, count) if place % 2 == 1]
    r = min(r, (count - prefix) // 2)
    ends = [*range(prefix)], [*range(count, total)]
    for sample, kept, gone, new in zip(likeness, stay.tolist(), merged.tolist(), into.tolist(), strict=True):
        others = [place for place in even if place not in gone]
        rest = kept[prefix : total - r - suffix]
        if len(gone) != r or len({*gone}) != r or not {*gone} <= {*even}:
            return False
        if (kept[:prefix], kept[len(kept) - suffix :]) != ends or sorted(rest) != sorted(others + odd):
            return False
        if prefix and rest != others + odd:
            return False
        if not r:
            continue
        best = sample[:, odd].amax(1)
        partners = [kept[place] for place in new]
        if not {*partners} <= {*odd} or not _close(sample[gone, partners], best[gone]):
            return False
        if others and float(best[gone].min()) < float(best[others].max()) - 1e-6:
            return False
    return True


def _weights(queries: Tensor, keys: Tensor, sizes: Tensor | None, scale: float | None) -> Tensor:
    """Attention weights (B, M, N), their mean over heads."""
    logits = torch.einsum("bhmd,bhnd->bhmn", queries.double(), keys.double())
    logits = logits * scale if scale is not None else logits / keys.shape[-1] ** 0.5
    if sizes is not None:
        logits = logits + sizes[:, -keys.shape[2] :].double().log()[:, None, None]
    return torch.exp(logits - logits.logsumexp(-1, keepdim=True)).mean(1)


def _lowest_go(stay: Tensor, scores: Tensor, r: int, prefix: int, suffix: int) -> bool:
    """Whether all tokens stay, in order, but r patches, at most half of them, with the lowest scores (B, N)."""
    total = scores.shape[1]
    patches = total - prefix - suffix
    r = min(r, patches // 2)
    for kept, sample in zip(stay.tolist(), scores.tolist(), strict=True):
        gone = [place for place in range(total) if place not in kept]
        if sorted(kept) != kept or len(gone) != r or not all(prefix <= place < total - suffix for place in gone):
            return False
        left = [sample[place] for place in kept if prefix <= place < total - suffix]
        if gone and left and max(sample[place] for place in gone) > min(left) + 1e-6 * max(map(abs, sample)):
            return False
    return True


def _attended(
    found: Any, queries: Tensor, keys: Tensor, values: Tensor, r: int, prefix: int, scale: float | None, suffix: int = 0
) -> bool:
    """Weight of the class token times norm of the value (Fayyaz et al., ECCV 2022)."""
    lengths = values.double().square().sum((1, 3)).sqrt()
    return _lowest_go(found, _weights(queries[:, :, :1], keys, None, scale)[:, 0] * lengths, r, prefix, suffix)


def _chosen(
    found: Any, queries: Tensor, keys: Tensor, sizes: Tensor | None, r: int, prefix: int, scale: float | None, suffix: int = 0
) -> bool:
    """Self-attention times attention by others (Xu et al., WACV 2024, Sec. 3)."""
    weights = _weights(queries, keys, sizes, scale)
    own = weights.diagonal(dim1=1, dim2=2)
    return _lowest_go(found[0], own * (weights.sum(1) - own), r, prefix, suffix)


def _neighbours(found: Any, keys: Tensor, places: Tensor | None, grid: Any, prefix: int, edges: int, suffix: int = 0) -> bool:
    """Patches that touch in the image, and the most alike (Xu et al., WACV 2024)."""
    total = keys.shape[2]
    patches = range(prefix, total - suffix)
    mean = F.normalize(keys.double().mean(1)[:, prefix : total - suffix], dim=-1)
    for sample, weights in enumerate(found.double()):
        rows = torch.arange(total, device=keys.device) if places is None else places[sample]
        axes = torch.unravel_index(rows[prefix : total - suffix] - prefix, [int(size) for size in grid])
        apart = torch.stack([(axis.unsqueeze(1) - axis).abs() for axis in axes]).amax(0)
        alike = mean[sample] @ mean[sample].T
        alike.fill_diagonal_(0)
        least = alike.sort(dim=1, descending=True).values[:, min(edges, len(patches)) - 1 :][:, :1]
        chosen = torch.where(alike >= least, alike.clamp(min=0), 0)
        joined = torch.maximum(chosen, chosen.T) + (apart == 1)
        degree = joined.sum(1).clamp(min=1e-30)
        wanted = torch.zeros((total, total), dtype=torch.float64, device=keys.device)
        wanted[prefix : total - suffix, prefix : total - suffix] = joined / (degree.unsqueeze(1) * degree).sqrt()
        if not _close(weights, wanted):
            return False
    return True


_PICKS: Mapping[Any, Callable[..., bool]] = {
    match_tokens: _matches,
    most_attended: _attended,
    choose_tokens: _chosen,
    neighbour_graph: _neighbours,
}
# How many of their first arguments come from the attention.
_READS: Mapping[Any, int] = {match_tokens: 1, most_attended: 3, choose_tokens: 2, neighbour_graph: 1}
