"""`prune_pixels` as it is specified: the graph before, the graph expected, and near misses."""

import pytest
import torch
from torch import Tensor, nn

from papr_fx.dataflow.positionwise import PositionwiseProbe
from papr_fx.ops import gather_pixels, pixel_rows, resize_map, top_positions, write_pixels
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
    return prune_pixels.find_sites(graph_of(model, IMAGES), root, PositionwiseProbe(root, {}, training=False))


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


class Convolved(Before):
    """Near miss: no layer of the branch is pointwise."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)


@pytest.mark.parametrize(
    ("model", "reasons"),
    [
        (Normed, ["`narrow`: `act` mixes positions"]),
        (Elsewhere, ["`narrow`: its branch starts at `x`, neither the residual's source nor a depthwise convolution"]),
        (Convolved, []),
    ],
)
def test_other_branches_stay_dense(model, reasons):
    sites, skipped = sites_of(model())
    assert not sites
    assert [miss.reason for miss in skipped] == reasons
