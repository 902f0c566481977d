"""`coarsen_background` as it is specified: the graph before, the graph expected, and near misses."""

import pytest
import torch
from torch import Tensor, nn

import papr_fx
from papr_fx.dataflow.repairs import Pick, Repairs, TableSite
from papr_fx.ops import (
    TokenRows,
    add_quads,
    choose_quads,
    gather_positions,
    gather_tokens,
    halve_quads,
    join_quads,
    kept_patches,
    quad_members,
    resize_map,
)
from papr_fx.ops.rows import Span
from papr_fx.passes import coarsen_background as the_pass
from papr_fx.passes import gather_positions as tables
from papr_fx.passes import prune_tokens, splice_proposal
from papr_fx.passes.splice_proposal import Selection
from papr_fx.planning.patches import check_apart
from papr_fx.tracing.fakes import scratch_copy
from papr_fx.tracing.graphs import cut

from .specification import Brightness, assert_becomes, graph_of

IMAGES = torch.randn(3, 3, 8, 6)
BLOCKS = ("block",)


class Block(nn.Module):
    """Multiplies each patch by its row of a table, and leaves the class token as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(12, 5))  # one row per patch
        self.layer = nn.Linear(5, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        turned = tokens[:, 1:] * self.table
        return tokens + self.layer(torch.cat([tokens[:, :1], turned], 1))


class Before(nn.Module):
    """A class token, 4 x 3 patches with positions, and a block with a rotary table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 5, 2, 2)
        self.first = nn.Parameter(torch.randn(1, 1, 5))
        self.pos = nn.Parameter(torch.randn(1, 13, 5))
        self.block = Block()

    def patches(self, x: Tensor) -> Tensor:
        return self.embed(x).flatten(2).transpose(1, 2)  # (B, 12, 5)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first.expand(x.shape[0], -1, -1)
        return self.block(torch.cat([first, self.patches(x)], 1) + self.pos).mean(1)


class Expected(Before):
    """The same with at most half of the tokens: quads are embedded at half size, and their tokens gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.papr_proposal = Brightness()

    def forward(self, x: Tensor) -> Tensor:
        first = self.first.expand(x.shape[0], -1, -1)
        stream = torch.cat([first, self.patches(x)], 1)
        pos = self.pos
        stream = stream + pos  # (B, 13, 5)
        keep = choose_quads(resize_map(self.papr_proposal(x), (4, 3)), 0.5, 1)  # (B, 5): the class token and 4 quads
        patches = kept_patches(keep, 1)
        members = quad_members((4, 3), keep)
        halved = torch.cat([first, self.patches(halve_quads(x, (4, 3), (2, 2)))], 1) + pos
        kept = gather_tokens(join_quads(stream, halved, members, 1), keep)
        turned = kept[:, 1:]
        table = add_quads(self.block.table, members, [1], 3, (0, 0))
        turned = turned * gather_positions(table, patches, [1], 3)
        return (kept + self.block.layer(torch.cat([kept[:, :1], turned], 1))).mean(1)


def test_quads_are_embedded_a_second_time_and_tables_averaged():
    before = Before()
    graph = graph_of(before, IMAGES)
    site = prune_tokens.find_site(graph, BLOCKS)
    found = the_pass.find_site(site, "BCHW")
    assert found.patch == (2, 2)
    assert found.nodes[-1] is site.stream
    repairs = tables.find_sites(scratch_copy(before), site, BLOCKS, IMAGES)
    selection = Selection(site.rows.grid, 0.5, site.rows.prefix, coarse=True)
    keep = splice_proposal.rewrite(graph, splice_proposal.find_site(graph), site.stream.next, selection)
    members, joined, _ = the_pass.rewrite(graph, found, site, keep, site.rows.grid)
    tables.rewrite(graph, repairs, site, keep, members)
    prune_tokens.rewrite(graph, site, keep, joined)
    assert_becomes(before, graph, Expected(), IMAGES)


class Changing(Before):
    """Near miss: normalises its images in place."""

    def patches(self, x: Tensor) -> Tensor:
        return super().patches(x.sub_(0.5))


def test_images_that_are_changed_in_place_are_refused():
    site = prune_tokens.find_site(graph_of(Changing(), IMAGES), BLOCKS)
    with pytest.raises(papr_fx.NoSiteError, match="`sub_` changes the images in place"):
        the_pass.find_site(site, "BCHW")


def test_images_that_patches_do_not_cover_are_refused():
    images = torch.randn(3, 3, 9, 6)  # the last row of pixels is in no patch
    site = prune_tokens.find_site(graph_of(Before(), images), BLOCKS)
    with pytest.raises(papr_fx.NoSiteError, match="sought images that patches of one size cover, found images"):
        the_pass.find_site(site, "BCHW")


class Overlapping(Before):
    """Near miss: patches see the pixels of their neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(3, 3, 3, 1, 1), nn.Conv2d(3, 5, 2, 2))


class Normalised(Before):
    """Near miss: patches are normalised over all of the image."""

    def patches(self, x: Tensor) -> Tensor:
        return super().patches(x / x.std((1, 2, 3), keepdim=True))


class Pooled(Before):
    """Near miss: the last patch sees all others."""

    def patches(self, x: Tensor) -> Tensor:
        patches = super().patches(x)
        return torch.cat([patches[:, :-1], patches[:, -1:] + patches.mean(1, keepdim=True)], 1)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Overlapping, r"the windows of `embed.0` overlap \(Conv2d, kernel \(3, 3\), stride \(1, 1\)\)"),
        (Normalised, r"changing every second patch from \(0, 0\) on moves token 2 of `add`"),
        (Pooled, r"changing every second patch from \(0, 0\) on moves token 12 of `add_1`"),
    ],
)
def test_patches_that_see_each_other_are_refused(kind, reason):
    model = kind()
    graph = graph_of(model, IMAGES)
    site = prune_tokens.find_site(graph, BLOCKS)
    with pytest.raises(papr_fx.NoSiteError, match=reason):
        check_apart(cut(scratch_copy(model), graph, site.stream), IMAGES, site.rows, "BCHW")


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_patches_that_do_not_see_each_other_are_accepted(dtype):
    class Converting(Before):
        def patches(self, x: Tensor) -> Tensor:
            return super().patches(x.float())

    model, images = Converting(), torch.zeros(1, 3, 8, 6, dtype=dtype)
    graph = graph_of(model, images)
    site = prune_tokens.find_site(graph, BLOCKS)
    check_apart(cut(scratch_copy(model), graph, site.stream), images, TokenRows((4, 3), 1), "BCHW")


def test_a_table_of_whole_numbers_has_no_mean():
    graph = torch.fx.Graph()
    table = graph.placeholder("numbers")
    table.meta |= {"shape": (12,), "dtype": torch.int64}
    repairs = Repairs((TableSite("numbers", Pick((1,), 2, Span(1)), ()),))
    with pytest.raises(papr_fx.NoSiteError, match=r"`numbers` \(12,\) holds torch.int64"):
        the_pass.check_tables(graph, repairs)
    table.meta["dtype"] = torch.complex64
    the_pass.check_tables(graph, repairs)
