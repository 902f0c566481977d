"""Attention that `fuse_attention` leaves as it is written."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from papr_fx.passes import fuse_attention
from papr_fx.passes.kinds import Kind
from papr_fx.tracing.roles import find_all

from ..models.windows import ToyWindows, WindowAttention, swin_scores
from .specification import graph_of
from .test_fuse_attention import IMAGES, by_modules, positions, rewritten, run


def scaled_later(own, q, k):
    return (q @ k.transpose(-2, -1) + own.bias) * 0.7


def filled(own, q, k):
    return positions(own, q, k).masked_fill(own.mask[0] > 0, -1.0)


def both_kinds(own, q, k):
    return swin_scores(own, q, k) + k.sum(-1)[:, :, None]


def other_windows(own, q, k):
    return (positions(own, q, k).view(-1, 2, 2, 2, 4, 4) + own.mask[0]).view(-1, 2, 4, 4)


def per_image_and_window(own, q, k):
    mask = own.mask.view(1, 4, 1, 4, 4) * q.sum((-1, -2)).view(-1, 4, 2, 1, 1)
    return (positions(own, q, k).view(-1, 4, 2, 4, 4) + mask).view(-1, 2, 4, 4)


def other_dtype(own, q, k):
    return (q @ k.transpose(-2, -1)).float() + own.bias.float()


def flat(own, q, k):
    return (q.flatten(0, 1) @ k.flatten(0, 1).transpose(-2, -1)).unflatten(0, (-1, 2)) + own.bias


def by_einsum(own, q, k):
    return torch.einsum("bhnd,bhmd->bhnm", q, k) + own.bias


def read_twice(own, q, k):
    scores = positions(own, q, k)
    return scores + scores.amax(-1, keepdim=True)


@fx.wrap
def clamped(scores, mask):
    return scores.clamp_(-1.0)


def changed_in_place(own, q, k):
    return clamped(positions(own, q, k), None)


@fx.wrap
def with_mask(scores, mask):  # whose code may do more than return its argument
    return scores if mask is None else scores + mask


def by_a_users_function(own, q, k):
    return with_mask(positions(own, q, k), None)


def with_other_keys(own, q, k):
    scores = positions(own, q, k)
    k.mul_(2)
    return scores


def with_another_bias(own, q, k):
    bias = own.bias.clone()
    scores = (q * 0.7) @ k.transpose(-2, -1) + bias
    bias.zero_()
    return scores


def added_to_the_bias(own, q, k):
    return own.bias.repeat(q.shape[0], 1, 1, 1).add_((q * 0.7) @ k.transpose(-2, -1))


CHANGED = [by_a_users_function, with_other_keys, with_another_bias, added_to_the_bias]
MISSES = [
    *CHANGED,
    changed_in_place,
    scaled_later,
    filled,
    both_kinds,
    other_windows,
    per_image_and_window,
    flat,
    by_einsum,
    read_twice,
]


@pytest.mark.parametrize("scores", MISSES)
def test_scores_that_stay_as_they_are(scores):
    assert rewritten(ToyWindows(WindowAttention(scores)))[1] == 0


def over_queries(own, scores):
    return scores.softmax(-2)


def dropped(own, scores):
    return F.dropout(scores.softmax(-1), 0.4)


def rated(own, scores):
    return own.rated(scores.softmax(-1))


def kept(own, scores):
    weights = scores.softmax(-1)
    return weights * weights.sum(-2, keepdim=True)


def converted(own, scores):
    return other_dtype(own, scores, scores).softmax(-1).double()


def whole(own, scores):
    return scores.softmax(-1).to(torch.int64).to(scores.dtype)


@pytest.mark.parametrize("weights", [over_queries, dropped, rated, kept, converted, whole])
def test_weights_that_stay_as_they_are(weights):
    assert rewritten(ToyWindows(WindowAttention(weights=weights)))[1] == 0


@pytest.mark.parametrize("name", ["softmax", "dropout"])
def test_modules_with_hooks_are_called(name):
    model = ToyWindows(WindowAttention(weights=by_modules))
    called = []
    getattr(model.blocks[0].attention, name).register_forward_hook(lambda *_: called.append(name))
    graph, count = rewritten(model)
    assert count == 0
    run(model, graph)
    assert called == [name]


def test_what_another_pass_changed_is_left_alone():
    model = ToyWindows()
    graph = graph_of(model, IMAGES)
    (site,) = fuse_attention.find_sites(graph, model)
    weights = next(node for node in graph.nodes if node.name == site.path[0])
    with graph.inserting_after(weights):
        doubled = graph.call_function(torch.mul, (weights, 2))
    weights.replace_all_uses_with(doubled, delete_user_cb=lambda user: user is not doubled)
    expected = run(model, graph)
    fuse_attention.rewrite(graph, [site])
    assert not find_all(graph, Kind.FUSED)
    assert torch.equal(run(model, graph), expected)
