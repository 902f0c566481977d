"""`prune_pixels` as it is specified: the graph before, the graph expected, and near misses."""

import pytest
import torch
from torch import Tensor, nn

from papr_fx.dataflow.positionwise import PositionwiseProbe, VerdictCache
from papr_fx.ops import (
    TokenRows,
    gather_pixels,
    moved_cells,
    number_cells,
    pixel_rows,
    resize_map,
    top_positions,
    with_prefix,
    write_pixels,
)
from papr_fx.passes import prune_pixels
from papr_fx.passes.prune_pixels import PixelChoice, PixelSite, Skipped
from papr_fx.tracing.fakes import aliased_copy

from .specification import Brightness, assert_becomes, graph_of

IMAGES = torch.randn(3, 3, 8, 8)


class Before(nn.Module):
    """A ConvNeXt block: a depthwise convolution, then an MLP of 1x1 convolutions beside the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2, 2)
        self.spatial = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.widen, self.act, self.narrow = nn.Conv2d(4, 8, 1), nn.GELU(), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.stem(x)  # (B, 4, 4, 4)
        return shortcut + self.narrow(self.act(self.widen(self.spatial(shortcut))))


class Expected(Before):
    """The same with the MLP on half of the positions."""

    def __init__(self, background: str) -> None:
        super().__init__()
        self.background = background
        self.papr_proposal = Brightness()

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        keep = top_positions(resize_map(self.papr_proposal(x), (4, 4)), 0.5, 0)  # (B, 8)
        rows = pixel_rows(keep, (4, 4))  # (B * 8,)
        shortcut = self.stem(x)
        kept = gather_pixels(self.spatial(shortcut), rows, (4, 4), "BCHW")  # (B, 4, 8, 1)
        pixels = self.narrow(self.act(self.widen(kept)))
        return write_pixels(shortcut, pixels, rows, "BCHW", self.background)


def sites_of(model: nn.Module) -> tuple[tuple[PixelSite, ...], tuple[Skipped, ...]]:
    root = aliased_copy(model)
    return prune_pixels.find_sites(graph_of(model, IMAGES), root, PositionwiseProbe(root, VerdictCache(), training=False))


@pytest.mark.parametrize(
    ("background", "training", "expected"),
    [("auto", False, "zero"), ("auto", True, "keep"), ("keep", False, "keep"), ("zero", True, "zero")],
)
def test_the_mlp_runs_on_kept_positions(background, training, expected):
    before = Before()
    (site,), skipped = sites_of(before)
    assert not skipped
    assert site.rows.grid == (4, 4)
    assert site.convolution
    graph = graph_of(before, IMAGES)
    prune_pixels.rewrite(graph, [site], PixelChoice(0.5, background, training=training))
    assert_becomes(before, graph, Expected(expected), IMAGES)


class ClassToken(nn.Module):
    """Positions in one axis behind a class token, as in a ViT, and a residual MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2, 2)
        self.first = nn.Parameter(torch.randn(1, 1, 4))
        self.widen, self.act, self.narrow = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)

    def stream(self, x: Tensor) -> Tensor:
        return torch.cat([self.first.expand(x.shape[0], -1, -1), self.stem(x).flatten(2).transpose(1, 2)], 1)  # (B, 17, 4)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.stream(x)
        return shortcut + self.narrow(self.act(self.widen(shortcut)))


class ExpectedClassToken(ClassToken):
    """The class token is kept beside half of the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.papr_proposal = Brightness()

    def forward(self, x: Tensor) -> Tensor:
        keep = top_positions(resize_map(self.papr_proposal(x), (4, 4)), 0.5, 0)  # (B, 8)
        rows = pixel_rows(with_prefix(keep, 1), (17,))  # (B * 9,)
        shortcut = self.stream(x)
        kept = gather_pixels(shortcut, rows, (17,), "BNC")  # (B, 9, 4)
        return write_pixels(shortcut, self.narrow(self.act(self.widen(kept))), rows, "BNC", "keep")


class Windowed(nn.Module):
    """A residual MLP on positions that were moved into windows of 2 x 2, as in MaxViT."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2, 2)
        self.widen, self.act, self.narrow = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)

    def windows(self, x: Tensor) -> Tensor:
        sizes = x.shape  # (B, C, 4, 4)
        x = x.reshape(sizes[0], sizes[1], sizes[2] // 2, 2, sizes[3] // 2, 2)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(1, 2).flatten(2, 3)  # (B, 4, 4, C): windows, positions in them

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.windows(self.stem(x))
        return shortcut + self.narrow(self.act(self.widen(shortcut)))


class ExpectedWindowed(Windowed):
    """The cells of the grid are moved into the same windows. So the kept ones are known in that order."""

    def __init__(self) -> None:
        super().__init__()
        self.papr_proposal = Brightness()

    def forward(self, x: Tensor) -> Tensor:
        keep = top_positions(resize_map(self.papr_proposal(x), (4, 4)), 0.5, 0)  # (B, 8)
        cells = self.windows(number_cells(keep, (4, 4), "BCHW"))  # (1, 4, 4, 1)
        rows = pixel_rows(moved_cells(keep, cells), (4, 4))
        shortcut = self.windows(self.stem(x))
        kept = gather_pixels(shortcut, rows, (16,), "BHWC")  # (B, 8, 1, 4)
        return write_pixels(shortcut, self.narrow(self.act(self.widen(kept))), rows, "BHWC", "keep")


@pytest.mark.parametrize(
    ("before", "expected", "rows"),
    [
        (ClassToken, ExpectedClassToken, TokenRows((4, 4), 1)),
        (Windowed, ExpectedWindowed, TokenRows((4, 4))),
    ],
)
def test_positions_behind_a_class_token_or_in_windows(before, expected, rows):
    model = before()
    (site,), _ = sites_of(model)
    assert site.rows == rows
    assert (site.placing.moves is not None) == (before is Windowed)
    graph = graph_of(model, IMAGES)
    prune_pixels.rewrite(graph, [site], PixelChoice(0.5, "auto"))
    assert_becomes(model, graph, expected(), IMAGES)


class Normed(Before):
    """Near miss: a norm over space in the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.GroupNorm(1, 8)


class Elsewhere(Before):
    """Near miss: the branch starts at another value than the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x) + self.narrow(self.act(self.widen(self.spatial(x))))


class Grouped(Before):
    """Near miss: the branch starts at a convolution that mixes channels."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(4, 4, 3, padding=1, groups=2)


class Convolved(Before):
    """Near miss: no layer of the branch is pointwise."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)


class Skipping(Before):
    """A skip connection that spans the whole block: the block's own branch is pruned, and it stays dense."""

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x) + super().forward(x)


def test_a_branch_that_holds_another_one_stays_dense():
    model = Skipping()
    sites, skipped = sites_of(model)
    assert [site.addition for site in sites] == ["add"]
    assert [miss.reason for miss in skipped if miss.addition == "add_1"] == [
        "`narrow`: its branch holds the residual addition `add`, whose own branch is pruned"
    ]


@pytest.mark.parametrize(
    ("model", "reasons"),
    [
        (Normed, ["`narrow`: `act` mixes positions"]),
        (Elsewhere, ["`narrow`: its branch starts at `x`, neither the residual's source nor a depthwise convolution"]),
        (Grouped, ["`narrow`: `spatial` mixes positions"]),
        (Convolved, []),
    ],
)
def test_other_branches_stay_dense(model, reasons):
    sites, skipped = sites_of(model())
    assert not sites
    assert [miss.reason for miss in skipped] == reasons
