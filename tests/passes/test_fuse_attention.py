"""`fuse_attention` as it is specified: forms of attention that become one call."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.attention import maybe_add_mask
from torch import Tensor, fx, nn

from papr_fx.ops import attention_mask
from papr_fx.passes import fuse_attention
from papr_fx.passes.kinds import Kind
from papr_fx.tracing.fakes import aliased_copy
from papr_fx.tracing.roles import find_all

from ..models.windows import ToyWindows, WindowAttention, swin_scores
from .specification import assert_becomes, graph_of

IMAGES = torch.randn(3, 3, 8, 8, dtype=torch.float64)


class Expected(WindowAttention):
    """Swin's attention as one call."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], 4, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        mask = attention_mask(q, (self.bias,), (self.mask.unsqueeze(1).unsqueeze(0),))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.7)
        return self.out(mixed.transpose(1, 2).reshape(x.shape[0], 4, 6))


def rewritten(model: nn.Module, images: Tensor = IMAGES) -> tuple[fx.Graph, int]:
    """The graph of a model with its attentions fused, and how many these are."""
    graph = graph_of(model, images)
    fuse_attention.rewrite(graph, fuse_attention.find_sites(graph, model))
    graph.lint()
    return graph, len(find_all(graph, Kind.FUSED))


def run(model: nn.Module, graph: fx.Graph, images: Tensor = IMAGES) -> Tensor:
    return fx.GraphModule(aliased_copy(model), graph)(images)


def test_the_graph_is_that_of_the_expected_module():
    before = ToyWindows()
    graph, count = rewritten(before)
    assert count == 1
    assert_becomes(before, graph, ToyWindows(Expected()), IMAGES)
    torch.testing.assert_close(run(before, graph), before(IMAGES), rtol=0, atol=1e-12)


def positions(own, q, k):
    return (q * 0.7) @ k.transpose(-2, -1) + own.bias


def in_place(own, q, k):
    scores = q @ k.mT
    scores *= 0.7
    scores += own.bias
    return scores


def per_image(own, q, k):
    scores = torch.matmul(q, k.permute(0, 1, 3, 2)).div(1.7)
    return own.bias[0] + scores + k.sum(-1)[:, :, None]


def cosine(own, q, k):
    return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(2, 3)) * own.temperature + own.bias[0, 0]


def sizes(own, q, k):
    return q.matmul(k.swapaxes(-1, -2)) / math.sqrt(q.size(-1)) * q.shape[-1] ** -0.25


def shared_queries(own, q, k):
    scaled = q * 0.7
    return scaled @ k.transpose(-2, -1) + scaled.sum(-1, keepdim=True) * own.bias


def two_masks(own, q, k):
    scores = swin_scores(own, q, k).unflatten(0, (-1, 4))
    return (own.mask.abs().view(4, 1, 4, 4) + scores).flatten(0, 1) + own.bias


def without_mask(own, q, k):
    return maybe_add_mask(positions(own, q, k), None)


FORMS = [without_mask, positions, in_place, per_image, cosine, sizes, shared_queries, two_masks]


def typed(own, scores):
    return F.dropout(own.identity(F.softmax(scores, dim=-1, dtype=torch.float64)).to(scores.dtype), 0.4, own.training)


def by_modules(own, scores):
    return own.dropout(own.softmax(scores))


def by_function(own, scores):
    return F.dropout(torch.softmax(scores, 3), p=0.0)


@pytest.mark.parametrize("scores", FORMS)
def test_scores_in_every_form(scores):
    model = ToyWindows(WindowAttention(scores))
    graph, count = rewritten(model)
    assert count == 1
    torch.testing.assert_close(run(model, graph), model(IMAGES), rtol=0, atol=1e-12)


@pytest.mark.parametrize("weights", [typed, by_modules, by_function])
def test_weights_in_every_form(weights):
    model = ToyWindows(WindowAttention(weights=weights))
    graph, count = rewritten(model)
    assert count == 1
    torch.testing.assert_close(run(model, graph), model(IMAGES), rtol=0, atol=1e-12)


class Drawn(nn.Module):
    """One attention with terms of these shapes, some of them per window."""

    def __init__(self, shapes: list[tuple[int, ...]], windows: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes, self.windows = shapes, windows
        for number, shape in enumerate([*shapes, *windows]):
            self.register_buffer(f"term_{number}", torch.randn(shape, dtype=torch.float64) * 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.flatten(0, 1).unbind(1)  # (B * 3, heads, N, D)
        terms = [getattr(self, f"term_{number}") for number in range(len(self.shapes) + len(self.windows))]
        scores = q @ k.transpose(-2, -1) * 0.6
        for term in terms[: len(self.shapes)]:
            scores = scores + term
        if self.windows:
            scores = scores.unflatten(0, (-1, 3))
            for term in terms[len(self.shapes) :]:
                scores = term + scores
            scores = scores.flatten(0, 1)
        return scores.softmax(-1) @ v


@st.composite
def drawn_terms(draw):
    """Heads, positions, and shapes of terms that broadcast to their scores; per window, of three."""
    heads, count = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    size = lambda whole: draw(st.sampled_from([1, whole]))  # noqa: E731
    shapes = [(1, size(heads), size(count), size(count))[draw(st.integers(0, 3)) :] for _ in range(draw(st.integers(0, 2)))]
    windows = [(3, size(heads), size(count), size(count)) for _ in range(draw(st.integers(0, 2)))]
    return heads, count, shapes, [(1, *shape)[draw(st.integers(0, 1)) :] for shape in windows]


@settings(max_examples=12)
@given(drawn_terms())
def test_terms_of_any_shape(terms):
    heads, count, shapes, windows = terms
    model = Drawn(shapes, windows)
    x = torch.randn(2, 3, 3, heads, count, 4, dtype=torch.float64)
    graph = graph_of(model, x)
    fuse_attention.rewrite(graph, fuse_attention.find_sites(graph, model))
    assert len(find_all(graph, Kind.FUSED)) == 1
    torch.testing.assert_close(fx.GraphModule(model, graph)(x), model(x), rtol=0, atol=1e-12)


def test_the_mask_takes_the_dtype_of_the_queries():
    queries = torch.randn(8, 2, 4, 3, dtype=torch.bfloat16)
    mask = attention_mask(queries, (torch.randn(2, 4, 4),), (torch.randn(4, 1, 4, 4),))
    assert (mask.shape, mask.dtype) == ((8, 2, 4, 4), torch.bfloat16)
    assert torch.equal(mask[:4], mask[4:])
    assert not torch.equal(mask[0], mask[1])
    hidden = attention_mask(queries, (torch.full((2, 4, 4), torch.finfo(torch.float32).min),))
    assert hidden.isfinite().all()  # a row that is masked throughout has even weights, and no weights of zero
    small = attention_mask(queries, (torch.randn(2, 4, 4),))
    assert (small.shape, small.dtype) == ((1, 2, 4, 4), torch.bfloat16)
