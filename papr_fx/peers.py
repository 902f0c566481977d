"""What pruned models are measured against: PaPr transcribed plainly, and token merging."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import ops
from .errors import ArgumentError
from .macs import count_module_macs
from .module import PrunedModule, shell


def transcribed(gm: PrunedModule) -> fx.GraphModule:
    """The same model with PaPr as one would write it down: a `gather` with the index expanded; zeros, a scatter and a sum.

    The proposal is fused all the same, and nothing is laid out in channels-last memory.
    """
    graph = copy.deepcopy(gm.graph)
    plain = {ops.gather_tokens: _gather_tokens, ops.gather_pixels: _gather_pixels, ops.write_pixels: _write_pixels}
    for node in graph.nodes:
        node.target = plain.get(node.target, node.target)
        if node.name == "papr_channels_last":
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
    return fx.GraphModule(shell(gm), graph)


def _gather_tokens(tokens: Tensor, keep: Tensor) -> Tensor:
    return tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _positions(x: Tensor, channels: int) -> Tensor:
    """(B, n, C)."""
    return x.movedim(channels, -1).flatten(1, -2)


def _index(rows: Tensor, like: Tensor) -> Tensor:
    """Flat rows of the batch as indices (B, k, C) into the positions of each sample."""
    keep = rows.view(like.shape[0], -1) % like.shape[1]
    return keep.unsqueeze(-1).expand(-1, -1, like.shape[2])


def _gather_pixels(x: Tensor, rows: Tensor, grid: Sequence[int], layout: str) -> Tensor:
    channels = layout.index("C")
    positions = _positions(x, channels)
    kept = positions.gather(1, _index(rows, positions))  # (B, k, C)
    return (kept.unsqueeze(2) if x.ndim == 4 else kept).movedim(-1, channels)


def _write_pixels(residual: Tensor, branch: Tensor, rows: Tensor, layout: str, background: str) -> Tensor:
    channels = layout.index("C")
    dense, kept = _positions(residual, channels), _positions(branch, channels)
    index = _index(rows, dense)
    padded = torch.zeros_like(dense).scatter(1, index, kept.to(dense.dtype))
    passed = dense if background == "keep" else torch.zeros_like(dense).scatter(1, index, dense.gather(1, index))
    return (passed + padded).view(residual.movedim(channels, -1).shape).movedim(-1, channels)


class Matching(NamedTuple):
    """Which tokens are merged: A are those at even places, B those at odd ones (Bolya et al., ICLR 2023, Sec. 3.2).

    Attributes:
        unmerged: Tokens of A that stay, (B, n - r).
        merged: Tokens of A that are merged, (B, r).
        into: The token of B that each is merged into, (B, r).
    """

    unmerged: Tensor
    merged: Tensor
    into: Tensor


def match(keys: Tensor, r: int, prefix: int) -> Matching:
    """Bipartite soft matching.

    Args:
        keys: The metric (B, N, D): keys averaged over heads.
        r: Tokens to merge; at most half of those behind the prefix are.
        prefix: Leading tokens that stay.
    """
    metric = keys / keys.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)  # (B, ceil(N / 2), floor(N / 2))
    scores[:, : (prefix + 1) // 2] = -torch.inf
    scores[:, :, : prefix // 2] = -torch.inf
    best, partner = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    r = min(r, (keys.shape[1] - prefix) // 2)
    merged, unmerged = order[:, :r], order[:, r:]
    return Matching(unmerged.sort(dim=1).values if prefix else unmerged, merged, partner.gather(1, merged))


def merge(x: Tensor, matching: Matching) -> Tensor:
    """Sums merged tokens: (B, N, C) becomes (B, N - r, C), what stays of A before B."""

    def pick(index: Tensor) -> Tensor:
        return x[:, ::2].gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

    into = matching.into.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    return torch.cat([pick(matching.unmerged), x[:, 1::2].scatter_add(1, into, pick(matching.merged))], dim=1)


class MergedViT(nn.Module):
    """A timm ViT that merges r tokens in every block, between attention and MLP, with attention in proportion to size.

    Args:
        model: A model with the parts of timm's VisionTransformer; they are shared.
        r: Tokens merged in each block.

    Raises:
        ArgumentError: The model has other parts.
    """

    def __init__(self, model: nn.Module, r: int) -> None:
        super().__init__()
        parts = ("patch_embed", "_pos_embed", "patch_drop", "norm_pre", "blocks", "norm", "forward_head", "num_prefix_tokens")
        inside = ("norm1", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.norm", "attn.proj", "ls1", "norm2", "mlp", "ls2")
        missing = [part for part in parts if not hasattr(model, part)]
        if not missing:
            first = cast(Any, model).blocks[0]
            missing = [f"blocks.0.{part}" for part in inside if not _has(first, part)]
        if missing:
            raise ArgumentError(
                f"token merging is measured on models with the parts of timm's ViT: {type(model).__name__} has no {missing[0]}"
            )
        self.model = model
        self.r = r

    def forward(self, images: Tensor) -> Tensor:
        model = cast(Any, self.model)
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        size = x.new_ones(x.shape[0], x.shape[1], 1)
        for block in model.blocks:
            x, size = self._block(block, x, size)
        return model.forward_head(model.norm(x))

    def _block(self, block: Any, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        attention = block.attn
        tokens = block.norm1(x)
        batch, count, width = tokens.shape
        qkv = attention.qkv(tokens).reshape(batch, count, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        queries, keys, values = attention.q_norm(qkv[0]), attention.k_norm(qkv[1]), qkv[2]
        bias = size.log().view(batch, 1, 1, count)  # a token that stands for many is attended to as many
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
        mixed = attention.proj(attention.norm(mixed.transpose(1, 2).reshape(batch, count, width)))
        x = x + block.ls1(mixed)
        if self.r:
            matching = match(keys.mean(1), self.r, cast(Any, self.model).num_prefix_tokens)
            x, size = merge(x * size, matching), merge(size, matching)
            x = x / size
        return x + block.ls2(block.mlp(block.norm2(x))), size


def merged_at(model: nn.Module, images: Tensor, macs: int) -> MergedViT:
    """A `MergedViT` of about so many multiply-accumulates for one image shaped like `images` (B, C, H, W)."""
    low, high = 0, 1 << 10
    while high - low > 1:  # fewer MACs with every token merged
        middle = (low + high) // 2
        low, high = (middle, high) if count_module_macs(MergedViT(model, middle), images) > macs else (low, middle)
    candidates = [MergedViT(model, r) for r in (low, high)]
    return min(candidates, key=lambda merged: abs(count_module_macs(merged, images) - macs))


def _has(module: object, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(module, name):
            return False
        module = getattr(module, name)
    return True
