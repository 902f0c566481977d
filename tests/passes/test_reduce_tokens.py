"""`reduce_tokens` and its reductions as they are specified: the graph before, the graph expected, and near misses."""

import operator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import papr_fx
from papr_fx.ops import (
    choose_tokens,
    fuse_tokens,
    gather_tokens,
    match_tokens,
    mean_by_size,
    merge_tokens,
    most_attended,
    neighbour_graph,
    propagate_tokens,
    size_bias,
)
from papr_fx.passes import prune_tokens, reduce_tokens
from papr_fx.passes.kinds import Kind
from papr_fx.passes.reduce_tokens import Remaining
from papr_fx.passes.reduction import Reduction
from papr_fx.tracing.fakes import scratch_copy
from papr_fx.tracing.roles import find_all

from .specification import assert_becomes, graph_of

IMAGES = torch.randn(3, 3, 4, 8)
BLOCKS = ("blocks.0", "blocks.1")


class Block(nn.Module):
    """Attention of one head and a layer, each with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.layer = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = (part(tokens).unsqueeze(1) for part in (self.query, self.key, self.value))  # (B, 1, N, 4)
        tokens = tokens + scaled_dot_product_attention(q, k, v).squeeze(1)
        return tokens + self.layer(tokens)


class Before(nn.Module):
    """A class token, 2 x 4 patches, two blocks, a mean over all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 2, 2)
        self.first = nn.Parameter(torch.randn(1, 1, 4))
        self.blocks = nn.ModuleList([Block(), Block()])

    def stream(self, x: Tensor) -> Tensor:
        patches = self.embed(x).flatten(2).transpose(1, 2)  # (B, 8, 4)
        return torch.cat([self.first.expand(x.shape[0], -1, -1), patches], 1)  # (B, 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stream(x)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens.mean(1)


class Reduced(Before):
    """The same with one token less after each attention. Subclasses say how."""

    def attended(self, block: Block, tokens: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v = (part(tokens).unsqueeze(1) for part in (block.query, block.key, block.value))
        options = {} if bias is None else {"attn_mask": size_bias(bias, k)}
        return q, k, v, tokens + scaled_dot_product_attention(q, k, v, **options).squeeze(1)


class Merged(Reduced):
    """`Merge`: the most similar patches become one, which counts twice from then on."""

    def forward(self, x: Tensor) -> Tensor:
        tokens, sizes = self.stream(x), None
        for block in self.blocks:
            _, k, _, tokens = self.attended(block, tokens, sizes)
            merged = merge_tokens(tokens, sizes, match_tokens(k, 1, 1))
            tokens, sizes = operator.getitem(merged, 0), operator.getitem(merged, 1)
            tokens = tokens + block.layer(tokens)
        return mean_by_size(tokens, 1, sizes)


class Fused(Reduced):
    """`TokenFusion`: one of two similar patches is dropped in the first block; in the second they are fused."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.blocks
        _, k, _, tokens = self.attended(first, self.stream(x), None)
        tokens = gather_tokens(tokens, operator.getitem(match_tokens(k, 1, 1), 0))
        tokens = tokens + first.layer(tokens)
        _, k, _, tokens = self.attended(second, tokens, None)
        fused = fuse_tokens(tokens, None, match_tokens(k, 1, 1))
        tokens, sizes = operator.getitem(fused, 0), operator.getitem(fused, 1)
        return mean_by_size(tokens + second.layer(tokens), 1, sizes)


class Propagated(Reduced):
    """`TokenPropagation`: a dropped patch hands a share of itself to its neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        tokens, sizes, places = self.stream(x), None, None
        for block in self.blocks:
            q, k, _, tokens = self.attended(block, tokens, sizes)
            chosen = choose_tokens(q, k, sizes, 1, 1, None)
            out = propagate_tokens(tokens, sizes, chosen, neighbour_graph(k, places, (2, 4), 1, 8), 0.2)
            tokens, sizes, stay = operator.getitem(out, 0), operator.getitem(out, 1), operator.getitem(chosen, 0)
            places = stay if places is None else torch.gather(places, 1, stay)
            tokens = tokens + block.layer(tokens)
        return mean_by_size(tokens, 1, sizes)


class Attended(Reduced):
    """`AttentionPruning`: the patch that the class token attends to least is dropped."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stream(x)
        for block in self.blocks:
            q, k, v, tokens = self.attended(block, tokens, None)
            tokens = gather_tokens(tokens, most_attended(q, k, v, 1, 1, None))
            tokens = tokens + block.layer(tokens)
        return tokens.mean(1)


def find(model: nn.Module, graph: torch.fx.Graph) -> tuple[prune_tokens.TokenSite, reduce_tokens.ReductionSites]:
    site = prune_tokens.find_site(graph, BLOCKS)
    return site, reduce_tokens.find_sites(scratch_copy(model), site, BLOCKS, papr_fx.Merge(1, "all"), IMAGES)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        (papr_fx.Merge(1, "all"), Merged),
        (papr_fx.peers.TokenFusion(1, linear_from=1), Fused),
        (papr_fx.peers.TokenPropagation(1), Propagated),
        (papr_fx.peers.AttentionPruning(1), Attended),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Reduction) else "",
)
def test_each_block_leaves_one_token_less(reduction, expected):
    before = Before()
    graph = graph_of(before, IMAGES)
    site, found = find(before, graph)
    assert [place.block for place in found.sites] == [*BLOCKS]
    reduce_tokens.rewrite(graph, found, reduction, Remaining(site.rows.grid, site.rows, site.rows.cells, None))
    assert_becomes(before, graph, expected(), IMAGES)
    assert len(find_all(graph, Kind.REDUCED)) == 2


class Masked(Block):
    """Near miss: its attention has a mask, and a merged token has no row in it."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.randn(9, 9))

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = (part(tokens).unsqueeze(1) for part in (self.query, self.key, self.value))
        tokens = tokens + scaled_dot_product_attention(q, k, v, attn_mask=self.mask).squeeze(1)
        return tokens + self.layer(tokens)


class Skipping(Before):
    """Near miss: a shortcut carries all tokens past the blocks."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = stream = self.stream(x)
        for block in self.blocks:
            tokens = block(tokens)
        return (tokens + stream).mean(1)


def masked() -> nn.Module:
    model = Before()
    model.blocks = nn.ModuleList([Masked(), Masked()])
    return model


@pytest.mark.parametrize(("make", "message"), [(masked, "has a mask or a bias"), (Skipping, "no residual addition")])
def test_other_models_are_not_reduced(make, message):
    model = make()
    with pytest.raises(papr_fx.NoSiteError, match=message):
        find(model, graph_of(model, IMAGES))
