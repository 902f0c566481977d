"""What attention computes for some keys only, written out: no code is shared with the proof."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


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
