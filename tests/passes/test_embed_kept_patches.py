"""`embed_kept_patches` as it is specified: the graph before, the graph expected, and near misses."""

import pytest
import torch
from torch import Tensor, nn

from papr_fx.ops import (
    choose_quads,
    embed_patches,
    embed_quads,
    gather_tokens,
    halve_quads,
    join_quads,
    kept_patches,
    quad_members,
    resize_map,
    top_positions,
)
from papr_fx.passes import coarsen_background, embed_kept_patches, prune_tokens, splice_proposal
from papr_fx.passes.embed_kept_patches import Embedding
from papr_fx.tracing.fakes import scratch_copy
from papr_fx.tracing.trace import OpenError, trace

from ..models import enliven
from .specification import Brightness, assert_becomes, graph_of

IMAGES = torch.randn(3, 3, 4, 6)
BLOCKS = ("blocks.0", "blocks.1")


class Block(nn.Module):
    """A block: it treats each token independently."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.layer(self.norm(tokens))


class Before(nn.Module):
    """A class token, 2 x 3 patches with positions, two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 2, 2)
        self.first = nn.Parameter(torch.randn(1, 1, 6))
        self.table = nn.Parameter(torch.randn(1, 7, 6))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 5)

    def patches(self, x: Tensor) -> Tensor:
        return self.embed(x)

    def tokens(self, cells: Tensor) -> Tensor:
        return torch.cat([self.first.expand(cells.shape[0], -1, -1), cells.flatten(2).transpose(1, 2)], 1) + self.table

    def forward(self, x: Tensor) -> Tensor:
        stream = self.tokens(self.patches(x))
        for block in self.blocks:
            stream = block(stream)
        return self.read(stream)

    def read(self, stream: Tensor) -> Tensor:
        return self.head(stream.mean(1))


class Expected(Before):
    """The same, which embeds three of the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.papr_proposal = Brightness()

    def forward(self, x: Tensor) -> Tensor:
        psm = resize_map(self.papr_proposal(x), (2, 3))
        keep = top_positions(psm, 0.5, 1)
        patches = kept_patches(keep, 1)
        cells = embed_patches(x, patches, self.embed)
        stream = gather_tokens(self.tokens(cells), keep)
        for block in self.blocks:
            stream = block(stream)
        return self.read(stream)


def embedding(model, opened=None):
    graph = graph_of(model, IMAGES) if opened is None else trace(model, IMAGES, lambda _, name: name in opened).graph
    site = prune_tokens.find_site(graph, BLOCKS)
    root = scratch_copy(enliven(model).eval())
    return embed_kept_patches.find_site(root, site, IMAGES, opened or ()), site


def test_only_kept_patches_are_embedded():
    before = Before()
    found, site = embedding(before)
    assert found == Embedding("embed", (2, 2))
    graph = site.stream.graph
    (conv,) = [node for node in graph.nodes if node.name == "embed"]
    keep = splice_proposal.rewrite(graph, splice_proposal.find_site(graph), conv, splice_proposal.Selection((2, 3), 0.5, 1))
    embed_kept_patches.rewrite(graph, found, site, keep)
    prune_tokens.rewrite(graph, site, keep)
    assert_becomes(before, graph, Expected(), IMAGES)


class ExpectedQuads(Before):
    """The same with a coarse background: patches and quads are embedded once."""

    def __init__(self) -> None:
        super().__init__()
        self.papr_proposal = Brightness()

    def forward(self, x: Tensor) -> Tensor:
        psm = resize_map(self.papr_proposal(x), (2, 3))
        keep = choose_quads(psm, 0.5, 1)
        kept = kept_patches(keep, 1)
        quads = quad_members((2, 3), keep)
        halved = halve_quads(x, (2, 3), (2, 2))
        both = embed_quads(x, kept, self.embed, halved, quads)
        patches, copies = both[0], both[1]
        first = self.first.expand(patches.shape[0], -1, -1)
        stream = torch.cat([first, patches.flatten(2).transpose(1, 2)], 1)
        table = self.table
        stream = stream + table
        coarse = torch.cat([first, copies.flatten(2).transpose(1, 2)], 1) + table
        stream = gather_tokens(join_quads(stream, coarse, quads, 1), keep)
        for block in self.blocks:
            stream = block(stream)
        return self.read(stream)


def test_a_coarse_background_embeds_each_once():
    before = Before()
    found, site = embedding(before)
    graph = site.stream.graph
    (conv,) = [node for node in graph.nodes if node.name == "embed"]
    selection = splice_proposal.Selection((2, 3), 0.5, 1, coarse=True)
    keep = splice_proposal.rewrite(graph, splice_proposal.find_site(graph), conv, selection)
    twice = coarsen_background.find_site(site, "BCHW")
    coarsened = coarsen_background.rewrite(graph, twice, site, keep, (2, 3), conv)
    embed_kept_patches.rewrite(graph, found, site, keep, coarsened)
    prune_tokens.rewrite(graph, site, keep, coarsened.tokens)
    assert_becomes(before, graph, ExpectedQuads(), IMAGES)


class Inside(Before):
    """The convolution lies two modules deep."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 2, 2), nn.Identity()))


def test_modules_around_it_are_traced_through():
    with pytest.raises(OpenError) as error:
        embedding(Inside(), opened=("blocks",))
    assert error.value.modules == {"embed", "embed.0"}
    assert embedding(Inside(), opened=("blocks", "embed", "embed.0"))[0].node == "embed_0_0"


class Overlapping(Before):
    """Near miss: windows overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 3, 2, padding=1)


class Grouped(Before):
    """Near miss: a convolution in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 2, 2, groups=3)


class Sub(nn.Conv2d):
    """A class of a user's own."""


class OwnClass(Before):
    """Near miss: a class that may compute something else."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Sub(3, 6, 2, 2)


class Smoothed(Before):
    """Near miss: a convolution behind the embedding mixes patches."""

    def __init__(self) -> None:
        super().__init__()
        self.smooth = nn.Conv2d(6, 6, 3, padding=1)

    def patches(self, x: Tensor) -> Tensor:
        return self.smooth(self.embed(x))


class Rolled(Before):
    """Near miss: each patch sees the one above."""

    def patches(self, x: Tensor) -> Tensor:
        cells = self.embed(x)
        return cells + 0.01 * cells.roll(1, 2)


class Doubled(Before):
    """Near miss: the convolution embeds other images in the same batch."""

    def patches(self, x: Tensor) -> Tensor:
        return sum(self.embed(torch.cat([x, x.flip(-1)])).chunk(2))


class Normed(Before):
    """Near miss: a batch norm, which mixes patches in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6)

    def patches(self, x: Tensor) -> Tensor:
        return self.norm(self.embed(x))


class Centred(Before):
    """Near miss: the mean of all patches is taken off."""

    def tokens(self, cells: Tensor) -> Tensor:
        return super().tokens(cells - cells.mean((2, 3), keepdim=True))


class ReadTwice(Before):
    """Near miss: the head reads the patches too."""

    def forward(self, x: Tensor) -> Tensor:
        cells = self.patches(x)
        stream = self.tokens(cells)
        for block in self.blocks:
            stream = block(stream)
        return self.read(stream) + cells.mean()


class Returned(Before):
    """Near miss: the patches are returned."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        cells = self.patches(x)
        stream = self.tokens(cells)
        for block in self.blocks:
            stream = block(stream)
        return self.read(stream), cells


MISSES = [
    (Overlapping, "no convolution with touching windows makes the patches"),
    (Grouped, "no convolution with touching windows makes the patches"),
    (OwnClass, "no convolution with touching windows makes the patches"),
    (Smoothed, "other tokens depend on dropped patches in front of the first block"),
    (Rolled, "other tokens depend on dropped patches in front of the first block"),
    (Doubled, "`embed` embeds other images besides"),
    (Normed, "other tokens depend on dropped patches in front of the first block"),
    (Centred, "other tokens depend on dropped patches in front of the first block"),
    (ReadTwice, "`mean_1` reads `embed` too"),
    (Returned, "`output` reads `embed` too"),
]


@pytest.mark.parametrize(("kind", "reason"), MISSES, ids=lambda value: getattr(value, "__name__", ""))
def test_near_misses_embed_all_patches(kind, reason):
    assert embedding(kind())[0] == Embedding(reason=reason)
