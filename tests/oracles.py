"""Reference results that share no code with the passes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import ToyViT


def at_first_block(model: nn.Module, name: str, keep: Tensor, x: Tensor) -> Tensor:
    """The model run on the tokens `keep` (B, K): the first call of block `name` receives only these."""

    def pick(_module, args):
        handle.remove()
        return tuple(a.gather(1, keep[..., None].expand(-1, -1, a.shape[-1])) if isinstance(a, Tensor) else a for a in args)

    handle = model.get_submodule(name).register_forward_pre_hook(pick)
    return model(x)


def kept_tokens(mask: Tensor, prefix: int) -> Tensor:
    """Indices (B, prefix + k) of the prefix tokens and of the kept positions of a mask (B, *grid), in order."""
    kept = torch.stack([sample.flatten().nonzero()[:, 0] for sample in mask]) + prefix
    return torch.cat([torch.arange(prefix).expand(len(mask), prefix), kept], dim=1)


def with_hidden_keys(model: ToyViT, mask: Tensor, x: Tensor) -> Tensor:
    """The model's output from the kept tokens after its last block, all others hidden from every attention.

    The model runs with fused attention, which computes the same.
    """
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.attn.fused = True
    hidden = torch.cat([torch.zeros(len(mask), model.shape.prefix, dtype=torch.bool), ~mask.flatten(1)], dim=1)
    seen: list[Tensor] = []
    handle = model.blocks[-1].register_forward_hook(lambda _m, _i, out: seen.append(out))
    with attention_without(hidden) as attention:
        model(x)
    assert attention.seen
    handle.remove()
    return model.classify(seen[0][~hidden].view(len(mask), -1, seen[0].shape[-1]))


def resized_by_hand(maps: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Maps (B, t, h, w) resized to a grid."""
    return F.interpolate(maps.unsqueeze(1), grid, mode="trilinear", align_corners=True).squeeze(1)


def count_by_hand(positions: int, z: float, prefix: int = 0) -> int:
    """How many of the positions are kept, with z as the decimal that it is written as."""
    return max(1, min(positions, int((positions + prefix) * Decimal(repr(z)))))


def kept_by_hand(psm: Tensor, z: float, prefix: int) -> Tensor:
    """Mask of the kept positions of maps (B, t, h, w), by a full sort."""
    order = psm.flatten(1).argsort(dim=1, descending=True)[:, : count_by_hand(psm[0].numel(), z, prefix)]
    return torch.zeros_like(psm, dtype=torch.bool).flatten(1).scatter(1, order, True).view_as(psm)


@contextmanager
def attention_without(hidden: Tensor) -> Iterator[SimpleNamespace]:
    """While active, `scaled_dot_product_attention` leaves out hidden keys: sample by sample, they are cut off.

    Args:
        hidden: (B, N) bool, True for the tokens to leave out. Attention over another number of keys stays as it is.

    Yields:
        A namespace whose `seen` counts the calls over N keys.
    """
    counts = SimpleNamespace(seen=0)
    attend = F.scaled_dot_product_attention

    def attend_to_rest(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, **options):
        if key.shape[-2] != hidden.shape[1]:
            return attend(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
        assert not is_causal
        assert not dropout_p
        counts.seen += 1
        return torch.stack([_rest(*sample, scale) for sample in _samples(query, key, value, attn_mask, hidden)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend_to_rest)
        yield counts


def _samples(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, hidden: Tensor) -> Iterator[tuple]:
    for i, left_out in enumerate(hidden):
        rest = [n for n in range(len(left_out)) if not left_out[n]]
        given = None if mask is None else mask.expand(*query.shape[:-1], len(left_out))[i][..., rest]
        yield query[i], key[i][:, rest], value[i][:, rest], given


def _rest(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """One sample, (heads, N, D) over (heads, K, D)."""
    logits = torch.einsum("hnd,hkd->hnk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return torch.einsum("hnk,hkd->hnd", weights / weights.sum(-1, keepdim=True), value)
