"""`split_layers` as it is specified, in the forms of fused layers that it splits, and in those that it leaves whole."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import papr_fx
from papr_fx.ops import linear_columns, split_columns
from papr_fx.passes import narrow_rows

from ..models import enliven, toy_proposal
from .specification import assert_becomes
from .test_narrow_rows import IMAGES, Before, narrowing


class Fused(nn.Module):
    """Attention of two heads, with one layer for queries, keys and values."""

    places = (0, 1, 2)  # of queries, keys and values among its outputs

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)

    def heads(self, x: Tensor) -> list[Tensor]:
        """Three times (B, 2, N, 3)."""
        parts = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        return [parts[place] for place in self.places]

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(*self.heads(x))
        return self.out(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], 6))


class FusedBefore(Before):
    """A ViT with such attention."""

    def __init__(self, kind: type[Fused] = Fused) -> None:
        super().__init__()
        for block in self.blocks:
            block.attention = kind()


class FusedExpected(FusedBefore):
    """The same, whose last block makes queries of the class token only."""

    def forward(self, x: Tensor) -> Tensor:
        stream = self.blocks[0](self.embedded(x))
        block, attention = self.blocks[1], self.blocks[1].attention
        normed = block.norm(stream)  # (B, 7, 6)
        first = normed.narrow(-2, 0, 1)
        some = linear_columns(first, attention.qkv, 0, 6)  # (B, 1, 6)
        rest = linear_columns(normed, attention.qkv, 6, 18)  # (B, 7, 12)
        query = split_columns(some, 0, (2, 3), (0, 2, 1, 3))  # (B, 2, 1, 3)
        key = split_columns(rest, 0, (2, 3), (0, 2, 1, 3))
        value = split_columns(rest, 6, (2, 3), (0, 2, 1, 3))
        mixed = F.scaled_dot_product_attention(query, key, value)
        branch = attention.out(mixed.transpose(1, 2).reshape(normed.shape[0], 1, 6))
        tokens = stream.narrow(-2, 0, 1) + branch
        return self.read(tokens + block.layer(tokens))


class Chunked(Fused):
    """Chunks, with heads made afterwards."""

    def heads(self, x: Tensor) -> list[Tensor]:
        parts = self.qkv(x).chunk(3, -1)
        return [parts[place].view(*x.shape[:2], 2, 3).transpose(1, 2) for place in self.places]


class Sliced(Fused):
    """Slices, with an axis of no size."""

    def heads(self, x: Tensor) -> list[Tensor]:
        whole = self.qkv(x).unsqueeze(1)
        parts = [whole[..., 6 * place : 6 * place + 6].squeeze(1) for place in self.places]
        return [part.unflatten(-1, (2, 3)).transpose(1, 2) for part in parts]


class Last(Fused):
    """Keys first, queries last."""

    places = (2, 0, 1)


class Unbiased(Fused):
    """No bias."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18, bias=False)


class Between(Fused):
    """Near miss: queries lie between keys and values."""

    places = (1, 0, 2)


class Interleaved(Fused):
    """Near miss: the outputs of each head lie together."""

    def heads(self, x: Tensor) -> list[Tensor]:
        return list(self.qkv(x).reshape(x.shape[0], x.shape[1], 2, 3, 3).permute(3, 0, 2, 1, 4).unbind(0))


class Shared(Fused):
    """Near miss: keys are queries."""

    places = (0, 0, 2)


class Whole(Fused):
    """Near miss: something else reads all outputs."""

    def heads(self, x: Tensor) -> list[Tensor]:
        whole = self.qkv(x)
        query, key, value = (part.unflatten(-1, (2, 3)).transpose(1, 2) for part in whole.chunk(3, -1))
        return [query, key, value + whole.mean()]


class Adapted(nn.Linear):
    """Near miss: a layer that does more than a linear one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


class WithAdapter(Fused):
    """Attention with such a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = Adapted(6, 18)


def test_queries_of_the_row_that_is_read():
    before = FusedBefore()
    found, graph = narrowing(before)
    narrow_rows.rewrite(graph, found)
    assert_becomes(before, graph, FusedExpected(), IMAGES)


FORMS = {Fused: (0, 6), Chunked: (0, 6), Sliced: (0, 6), Last: (12, 18), Unbiased: (0, 6)}
WHOLE = (Between, Interleaved, Shared, Whole, WithAdapter)


@pytest.mark.parametrize("kind", [*FORMS, *WHOLE])
def test_forms_of_layers(kind):
    model = FusedBefore(kind)
    found, graph = narrowing(model)
    assert [(s.queries[1].start, s.queries[1].stop) for s in found.splits] == ([FORMS[kind]] if kind in FORMS else [])
    model, x = model.double(), IMAGES.double()
    expected = torch.fx.GraphModule(model, graph)(x)
    narrow_rows.rewrite(graph, found)
    torch.testing.assert_close(torch.fx.GraphModule(model, graph)(x), expected, rtol=1e-12, atol=1e-12)


class LowRank(nn.Module):
    """Adapts a layer, as peft does."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.down, self.up = layer, nn.Linear(6, 2, bias=False), nn.Linear(2, 18, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def pruned(model: nn.Module, *, narrow: bool) -> torch.fx.GraphModule:
    proposal = toy_proposal().to(next(model.parameters()).dtype)
    return papr_fx.transform(model, proposal, 0.5, narrow=narrow, example_input=IMAGES[:1], verify=False)


@pytest.mark.parametrize("change", ["adapted", "hooked", "quantised"])
def test_a_layer_that_is_changed_later(change):
    model = enliven(FusedBefore()).eval()
    narrowed, whole = (pruned(copy.deepcopy(model), narrow=narrow) for narrow in (True, False))
    before = narrowed(IMAGES)
    for gm in (narrowed, whole):
        attention = gm.get_submodule("blocks.1.attention")
        if change == "adapted":
            attention.qkv = enliven(LowRank(attention.qkv), seed=1)
        elif change == "hooked":
            attention.qkv.register_forward_hook(lambda _m, _a, out: out * 1.5)
        else:
            attention.qkv = Quantised(attention.qkv)
    expected = whole(IMAGES)
    assert not torch.allclose(before, expected, rtol=1e-2)
    torch.testing.assert_close(narrowed(IMAGES), expected, rtol=1e-4, atol=1e-4)


class Quantised(nn.Module):
    """A layer of whole numbers, which has a `weight` that cannot be sliced."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.numbers, self.bias = layer.weight.detach().mul(4).round().to(torch.int8), layer.bias

    def weight(self) -> Tensor:
        return self.numbers

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.numbers / 4, self.bias)


def test_parameters_are_shared_and_trained():
    model = enliven(FusedBefore()).double().train()
    results = []
    for narrow in (True, False):
        gm = pruned(copy.deepcopy(model), narrow=narrow)
        assert gm.state_dict().keys() == model.state_dict().keys()
        gm(IMAGES.double()).square().mean().backward()
        results.append({name: p.grad for name, p in gm.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-9, atol=1e-9)


def test_a_layer_with_a_hook_stays_whole():
    model = enliven(FusedBefore()).eval()
    seen = []
    model.blocks[1].attention.qkv.register_forward_hook(lambda _m, _a, out: seen.append(out.shape))
    gm = pruned(model, narrow=True)
    assert papr_fx.report(gm).narrowed == ("blocks.1", 4, 1)
    seen.clear()
    gm(IMAGES)
    assert seen == [(3, 4, 18)]


def test_weights_are_those_of_the_model():
    model = FusedBefore().eval()
    gm = pruned(model, narrow=True)
    before = gm(IMAGES)
    with torch.no_grad():
        model.blocks[1].attention.qkv.weight[:6] *= 3
    assert not torch.allclose(gm(IMAGES), before, rtol=1e-3)
