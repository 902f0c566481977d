"""`gather_positions` as it is specified: the graph before, the graph expected, and a near miss."""

import pytest
import torch
from torch import Tensor, nn

import papr_fx
from papr_fx.ops import gather_positions, gather_tokens, kept_patches, resize_map, top_positions
from papr_fx.ops.rows import Span
from papr_fx.passes import gather_positions as the_pass
from papr_fx.passes import prune_tokens, splice_proposal
from papr_fx.passes.splice_proposal import Selection
from papr_fx.tracing.fakes import scratch_copy

from .specification import Brightness, assert_becomes, graph_of

IMAGES = torch.randn(3, 3, 4, 8)
BLOCKS = ("block",)


class Block(nn.Module):
    """Multiplies each patch by its row of a table, and leaves the class token as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 5))  # one row per patch
        self.layer = nn.Linear(5, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        turned = tokens[:, 1:] * self.table
        return tokens + self.layer(torch.cat([tokens[:, :1], turned], 1))


class Before(nn.Module):
    """A class token, 2 x 4 patches, and a block with a rotary table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 5, 2, 2)
        self.first = nn.Parameter(torch.randn(1, 1, 5))
        self.block = Block()

    def stream(self, x: Tensor) -> Tensor:
        patches = self.embed(x).flatten(2).transpose(1, 2)  # (B, 8, 5)
        return torch.cat([self.first.expand(x.shape[0], -1, -1), patches], 1)  # (B, 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stream(x)).mean(1)


class Expected(Before):
    """The same with half of the tokens: the table is gathered by the kept patches."""

    def __init__(self) -> None:
        super().__init__()
        self.papr_proposal = Brightness()

    def forward(self, x: Tensor) -> Tensor:
        stream = self.stream(x)
        keep = top_positions(resize_map(self.papr_proposal(x), (2, 4)), 0.5, 1)  # (B, 5)
        kept = gather_tokens(stream, keep)
        patches = kept_patches(keep, 1)  # (B, 4): without the class token
        turned = kept[:, 1:]
        turned = turned * gather_positions(self.block.table, patches, [1], 3)
        return (kept + self.block.layer(torch.cat([kept[:, :1], turned], 1))).mean(1)


def test_a_table_is_gathered_where_it_meets_the_kept_tokens():
    before = Before()
    graph = graph_of(before, IMAGES)
    site = prune_tokens.find_site(graph, BLOCKS)
    repairs = the_pass.find_sites(scratch_copy(before), site, BLOCKS, IMAGES)
    (table,) = repairs.tables
    assert table.pick.axes == (1,)
    assert table.pick.span == Span(1, 0)
    selection = Selection(site.rows.grid, 0.5, site.rows.prefix)
    keep = splice_proposal.rewrite(graph, splice_proposal.find_site(graph), site.stream.next, selection)
    the_pass.rewrite(graph, repairs, site, keep)
    prune_tokens.rewrite(graph, site, keep)
    assert_becomes(before, graph, Expected(), IMAGES)


class Windows(Block):
    """Near miss: averages over windows of a fixed number of tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        means = tokens.view(tokens.shape[0], 3, 3, 5).mean(2, keepdim=True).expand(-1, -1, 3, -1)
        return tokens + self.layer(means.reshape(tokens.shape[0], 9, 5))


def test_windows_are_not_repaired():
    model = Before()
    model.block = Windows()
    site = prune_tokens.find_site(graph_of(model, IMAGES), BLOCKS)
    with pytest.raises(papr_fx.NoSiteError, match="`view` refused"):
        the_pass.find_sites(scratch_copy(model), site, BLOCKS, IMAGES)
