"""An unpruned model in which tokens are hidden from every attention: what a pruned one must compute for the others."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class HiddenKeys(TorchFunctionMode):
    """While active, every attention over `hidden.shape[1]` keys gives no weight to hidden ones.

    What an unpruned model computes for the other tokens is then what a pruned one must compute (PaPr, Sec. 3.3).

    Args:
        hidden: (B, N) bool, True for the tokens to hide; N counts the prefix tokens.
    """

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden
        self.seen = 0
        self._weights_follow = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        count = self.hidden.shape[1]
        given = {**dict(zip(_ATTENTION, args, strict=False)), **kwargs} if func is F.scaled_dot_product_attention else {}
        if given and given["key"].shape[-2] == count:
            given["attn_mask"] = self._bias(given["query"]) + self._given(given.get("attn_mask"), given["query"])
            args, kwargs = (), given
            self.seen += 1
        elif func is F.multi_head_attention_forward and args[1].shape[0] == count:
            kwargs["key_padding_mask"] = self.hidden
            self.seen += 1
        elif func in (torch.softmax, F.softmax, Tensor.softmax) and args[0].ndim in (3, 4) and args[0].shape[-1] == count:
            args = (args[0] + self._bias(args[0]), *args[1:])
            self.seen += 1
            self._weights_follow = True
        elif func in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and self._weights_follow and args[0].shape[-1] == count:
            args = (args[0], args[1].masked_fill(self._rows(args[1]), 0))  # weights may be mixed behind the softmax
            self._weights_follow = False
        return func(*args, **kwargs)

    def _bias(self, like: Tensor) -> Tensor:
        bias = torch.zeros(self.hidden.shape, dtype=like.dtype, device=like.device)
        bias = bias.masked_fill(self.hidden, float("-inf"))[:, None, :]  # (B, 1, N)
        return bias.unsqueeze(1) if like.ndim == 4 else bias.repeat_interleave(len(like) // len(bias), 0)  # heads by sample

    def _rows(self, values: Tensor) -> Tensor:
        rows = self.hidden.unsqueeze(-1)  # (B, N, 1)
        return rows.unsqueeze(1) if values.ndim == 4 else rows.repeat_interleave(len(values) // len(rows), 0)

    def _given(self, mask: Tensor | None, like: Tensor) -> Tensor | float:
        if mask is None:
            return 0.0
        return torch.where(mask, 0.0, float("-inf")).to(like.dtype) if mask.dtype == torch.bool else mask
