"""`splice_proposal` and `prune_tokens` as they are specified: the graph before, the graph expected, and near misses."""

import pytest
import torch
from torch import Tensor, nn

import papr_fx
from papr_fx.ops import gather_tokens, resize_map, top_positions
from papr_fx.passes import prune_tokens, splice_proposal
from papr_fx.passes.kinds import Kind
from papr_fx.passes.splice_proposal import Selection
from papr_fx.tracing.roles import find

from .specification import Brightness, assert_becomes, graph_of

IMAGES = torch.randn(3, 3, 4, 6)
BLOCKS = ("blocks.0", "blocks.1")


class Block(nn.Module):
    """Treats each token independently, as an MLP does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(5), nn.Linear(5, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.layer(self.norm(tokens))


class Before(nn.Module):
    """A ViT without its attention: a class token, 2 x 3 patches, two blocks, a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 5, 2, 2)
        self.first = nn.Parameter(torch.randn(1, 1, 5))
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        patches = self.embed(x).flatten(2).transpose(1, 2)  # (B, 6, 5)
        stream = torch.cat([self.first.expand(x.shape[0], -1, -1), patches], 1)  # (B, 7, 5)
        for block in self.blocks:
            stream = block(stream)
        return stream.mean(1)


class Expected(Before):
    """The same with half of the tokens: the kept ones are gathered before the first block."""

    def __init__(self) -> None:
        super().__init__()
        self.papr_proposal = Brightness()

    def forward(self, x: Tensor) -> Tensor:
        patches = self.embed(x).flatten(2).transpose(1, 2)
        stream = torch.cat([self.first.expand(x.shape[0], -1, -1), patches], 1)
        psm = resize_map(self.papr_proposal(x), (2, 3))  # (B, 2, 3)
        keep = top_positions(psm, 0.5, 1)  # (B, 4): the class token and int(7 * 0.5) patches
        kept = gather_tokens(stream, keep)  # (B, 4, 5)
        for block in self.blocks:
            kept = block(kept)
        return kept.mean(1)


def test_kept_tokens_are_gathered_before_the_first_block():
    before = Before()
    graph = graph_of(before, IMAGES)
    site = prune_tokens.find_site(graph, BLOCKS)
    selection = Selection(site.rows.grid, 0.5, site.rows.prefix)
    keep = splice_proposal.rewrite(graph, splice_proposal.find_site(graph), site.stream.next, selection)
    prune_tokens.rewrite(graph, site, keep)
    assert_becomes(before, graph, Expected(), IMAGES)
    assert find(graph, Kind.KEEP) is keep


class TwoImages(nn.Module):
    """Near miss of `splice_proposal`: two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def test_a_graph_of_two_inputs_has_no_place_for_a_proposal():
    graph = torch.fx.symbolic_trace(TwoImages()).graph
    with pytest.raises(papr_fx.NoSiteError, match="takes 2 inputs"):
        splice_proposal.find_site(graph)


class Spatial(Before):
    """Near miss of `prune_tokens`: its blocks map a grid to a grid."""

    def forward(self, x: Tensor) -> Tensor:
        grid = self.embed(x).permute(0, 2, 3, 1)  # (B, 2, 3, 5)
        for block in self.blocks:
            grid = block(grid)
        return grid.mean((1, 2))


def test_blocks_on_a_grid_have_no_token_stream():
    with pytest.raises(papr_fx.NoSiteError, match="positions keep a spatial layout in the trunk"):
        prune_tokens.find_site(graph_of(Spatial(), IMAGES), BLOCKS)


class Parallel(Before):
    """Near miss of `prune_tokens`: the second block reads a stream of its own."""

    def forward(self, x: Tensor) -> Tensor:
        patches = self.embed(x).flatten(2).transpose(1, 2)
        return (self.blocks[0](patches) + self.blocks[1](patches * 2)).mean(1)


def test_two_streams_are_not_pruned():
    with pytest.raises(papr_fx.NoSiteError, match="two token streams"):
        prune_tokens.find_site(graph_of(Parallel(), IMAGES), BLOCKS)
