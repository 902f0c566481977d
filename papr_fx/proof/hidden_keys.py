"""Part 8, hidden keys: tokens are what they would be if attention did not see the dropped ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from ..dataflow.attentions import SDPA_ARGUMENTS
from ..errors import VerifyError
from ..tracing.blocks import last_tokens
from ..tracing.graphs import cut, nodes_by_name, shape_of
from ..tracing.numerics import relative_error
from ..versions import tree_leaves
from .case import Case, ComparisonError


def check(case: Case) -> None:
    """Compares each half of the tokens, after the last block, with the dense graph whose attention sees no others.

    Fault: tokens are mixed outside attention, or something is normalised over all of them. The other parts do not find it:
    with all tokens kept there is nothing to miss, and with fewer the result is wrong in every order.
    Example: attention plus a static table, each with its own softmax over all tokens: kept tokens are off by 0.27,
    the permuted output by 2e-16.
    Does nothing for pixel operators (see `regions`).

    Raises:
        VerifyError: They differ by more than the tolerance, or no attention was seen.
    """
    if not case.rewrite.prunes_tokens:
        return
    found = error(case, case.halves, case.halves, case.image_twice)
    if not found <= case.tolerance:
        raise ComparisonError(
            f"hidden keys: the kept tokens of `{_last_tokens(case).name}` are off by {found:.1e} from those of the dense model "
            f"in which no attention sees the others ({case.tolerance:.0e} is allowed): something else mixes tokens, or "
            "normalises over them"
        )


def error(case: Case, kept: Sequence[Tensor], seen: Sequence[Tensor], images: Tensor | None = None) -> float:
    """The relative error of kept tokens after the last block, where the dense graph's attention sees only some patches.

    Args:
        case: The case of a token model.
        kept: The patches (b, k) that the rewritten graph keeps; a sequence of one.
        seen: The patches that attention sees, besides prefix tokens: `kept`, or others as a negative control.
        images: One for each row of patches; None for the first ones of the case.

    Raises:
        VerifyError: No attention was seen.
    """
    (keep,), (visible,) = case.indices(kept), case.indices(seen)
    images, last = case.images[: len(keep)] if images is None else images, _last_tokens(case)
    stream = case.rewrite.choices[0].stream
    count = cast("tuple[int, ...]", shape_of(last))[1]
    hidden = torch.ones((len(keep), count), dtype=torch.bool, device=images.device).scatter(1, visible, False)
    with HiddenKeys(hidden) as attention:
        dense = cast(Tensor, case.run(cut(case.root, case.dense.graph, last), images))
    if not attention.seen:
        raise VerifyError(
            f"hidden keys: no attention over the {count} tokens was seen after `{stream}` (neither "
            "scaled_dot_product_attention nor nn.MultiheadAttention, nor a softmax over keys). Tokens that are mixed in "
            "another way cannot be left out"
        )
    if attention.are_weights(dense):
        raise ComparisonError(
            f"hidden keys: a softmax over the tokens after `{stream}` is no attention: its weights multiply each token instead "
            "of being summed with values, so they grow as tokens become fewer"
        )
    graph = case.pruned.graph
    pruned = case.run(cut(case.root, graph, nodes_by_name(graph)[last.name]), images, keep)
    return relative_error(pruned, dense.gather(1, keep.unsqueeze(-1).expand(-1, -1, dense.shape[-1])))


def _last_tokens(case: Case) -> fx.Node:
    """The tokens after the last block, in the dense graph."""
    graph = case.dense.graph
    return last_tokens(graph, nodes_by_name(graph)[case.rewrite.choices[0].stream], case.rewrite.blocks)


class HiddenKeys(TorchFunctionMode):
    """While active, every attention over `hidden.shape[1]` keys gives no weight to hidden ones.

    A pruned model must compute what an unpruned one then computes for the other tokens (PaPr, Sec. 3.3). Where code puts
    further tokens in front of them, behind them or between them, an attention over all of these hides the same ones.

    Args:
        hidden: (B, N) bool, True for the tokens to hide; N counts the prefix tokens.
    """

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden
        self.seen = 0
        self._longer: dict[int, Tensor] = {}  # masks of longer sequences, by length
        self._parts: dict[int, tuple[Tensor, Tensor]] = {}  # parts of a sequence and their masks, by id
        self._weights: dict[int, tuple[Tensor, Tensor | None]] = {}  # weights before their sum, and their hidden columns, by id

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = {**dict(zip(SDPA_ARGUMENTS, args, strict=False)), **kwargs} if func is F.scaled_dot_product_attention else {}
        if given and (hidden := self._mask(given["key"].shape[-2])) is not None:
            given["attn_mask"] = self._bias(hidden, given["query"]) + self._given(given.get("attn_mask"), given["query"])
            args, kwargs = (), given
            self.seen += 1
        elif func is F.multi_head_attention_forward and (hidden := self._mask(args[1].shape[0])) is not None:
            kwargs["key_padding_mask"] = self._padding(hidden, kwargs.get("key_padding_mask"))
            self.seen += 1
        elif func in (torch.softmax, F.softmax, Tensor.softmax) and (axis := self._key_axis(args, kwargs)):
            hidden = cast(Tensor, self._mask(args[0].shape[axis]))
            bias = self._bias(hidden, args[0])  # (..., 1, N): keys are the last axis
            args = (args[0] + (bias if axis == -1 else bias.transpose(-2, -1)), *args[1:])
            self.seen += 1
            out = func(*args, **kwargs)
            self._weights[id(out)] = out, hidden if axis == -1 else None
            return out
        weights = [self._weights[id(given)] for given in tree_leaves((args, kwargs)) if id(given) in self._weights]
        if weights and func in _SUMS:
            args = [self._without_hidden(given) for given in args]  # weights may be mixed after the softmax
            kwargs = {name: self._without_hidden(given) for name, given in kwargs.items()}
        out = func(*args, **kwargs)
        if weights and func not in _SUMS:
            per_token = [made for made in tree_leaves(out) if isinstance(made, Tensor) and self._counts_tokens(made)]
            self._weights |= {id(made): (made, weights[0][1]) for made in per_token}
        self._follow(func, args, kwargs, out)
        return out

    def are_weights(self, tokens: Tensor) -> bool:
        """Whether a value follows from a softmax over tokens whose weights were not summed with values."""
        return id(tokens) in self._weights

    def _counts_tokens(self, value: Tensor) -> bool:
        """Whether a value may hold something for each token."""
        return any(self._mask(size) is not None for size in value.shape)

    def _without_hidden(self, value: Any) -> Any:
        """Attention weights (..., N) that are zero for hidden keys, alone or in a list; any other value as it is."""
        if isinstance(value, list | tuple):
            return [self._without_hidden(part) for part in cast("Sequence[Any]", value)]
        _, hidden = self._weights.get(id(value), (None, None))
        if hidden is None or value.ndim not in (3, 4) or value.shape[-1] != hidden.shape[1]:
            return value
        columns = hidden[:, None]  # (B, 1, N)
        columns = columns.unsqueeze(1) if value.ndim == 4 else columns.repeat_interleave(len(value) // len(columns), 0)
        return value.masked_fill(columns, 0)

    def _mask(self, count: int) -> Tensor | None:
        """Which of `count` keys are hidden, (B, count); None if they are not the tokens."""
        return self.hidden if count == self.hidden.shape[1] else self._longer.get(count)

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Notes which rows are hidden in parts of the tokens, and in longer sequences that are put together of them."""
        if func is Tensor.__getitem__ and isinstance(out, Tensor) and out.ndim == args[0].ndim == 3:
            whole, index = self._rows_of(args[0]), args[1]
            parts = cast("tuple[Any, ...]", index)[:2] if isinstance(index, tuple) else ()
            if whole is not None and len(parts) == 2 and all(isinstance(part, slice) for part in parts):
                self._parts[id(out)] = (out, whole[:, parts[1]])  # the tensor itself is held, so that its id stays its own
        elif func in _CONCATENATIONS and out.ndim in (3, 4) and _axis(args, kwargs) in (out.ndim - 2, -2):
            pieces = kwargs["tensors"] if "tensors" in kwargs else args[0]
            masks = [self._rows_of(piece) for piece in pieces]
            if any(mask is not None for mask in masks):
                none = torch.zeros_like(self.hidden[:, :1])
                known = [none.expand(-1, p.shape[-2]) if m is None else m for p, m in zip(pieces, masks, strict=True)]
                whole = torch.cat(known, dim=1)
                self._parts[id(out)] = (out, whole)
                if out.shape[-2] > self.hidden.shape[1]:
                    self._longer[out.shape[-2]] = whole

    def _rows_of(self, tokens: Tensor) -> Tensor | None:
        """Which rows of a value (B, n, C) or (B, H, n, D) are hidden, (B, n); None if it does not hold the tokens."""
        if id(tokens) in self._parts:
            return self._parts[id(tokens)][1]
        return self._mask(tokens.shape[-2]) if tokens.ndim in (3, 4) and len(tokens) == len(self.hidden) else None

    def _key_axis(self, args: Any, kwargs: Any) -> int:
        """The axis of the keys, -1 or -2, that a softmax of attention weights is over; 0 if it is none."""
        scores, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else None)
        if scores.ndim not in (3, 4) or not isinstance(dim, int):
            return 0
        axis = dim % scores.ndim - scores.ndim
        return axis if axis in (-1, -2) and self._mask(scores.shape[axis]) is not None else 0

    def _padding(self, hidden: Tensor, given: Tensor | None) -> Tensor:
        """A padding mask (B, N) that hides what the given one hides too."""
        if given is None:
            return hidden
        if given.dtype == torch.bool:
            return given | hidden
        return given.masked_fill(hidden, float("-inf"))

    def _bias(self, hidden: Tensor, like: Tensor) -> Tensor:
        bias = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
        bias = bias.masked_fill(hidden, float("-inf"))[:, None, :]  # (B, 1, N)
        return bias.unsqueeze(1) if like.ndim == 4 else bias.repeat_interleave(len(like) // len(bias), 0)  # heads by sample

    def _given(self, mask: Tensor | None, like: Tensor) -> Tensor | float:
        if mask is None:
            return 0.0
        return torch.where(mask, 0.0, float("-inf")).to(like.dtype) if mask.dtype == torch.bool else mask


# What sums weights with values, or on their own.
_SUMS = (
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.bmm, Tensor.bmm, torch.baddbmm, Tensor.baddbmm),
    *(torch.mm, Tensor.mm, torch.einsum, torch.tensordot, torch.sum, Tensor.sum, torch.mean, Tensor.mean),
)
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


def _axis(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The axis along which a call of `torch.cat` works."""
    given = next((kwargs[name] for name in ("dim", "axis") if name in kwargs), None)
    return given if given is not None else next(iter(args[1:]), 0)
