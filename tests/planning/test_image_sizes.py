"""Models that take several image sizes: the grid follows the image."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

import papr_fx
from papr_fx.planning import sizes
from papr_fx.tracing.numerics import relative_error

from ..models import Attention, Block, enliven, toy_proposal
from ..oracles import at_first_block, kept_tokens


class DeepEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2))
        self.scale = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.patches(x).transpose(1, 2))


class AnySize(nn.Module):
    """Takes any image size, as it has no position table; the grid is flattened two modules deep."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size = 16
        self.embed = DeepEmbedding()
        self.blocks = nn.ModuleList(Block(8, Attention(8, 2, True)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


class ChannelsLast(AnySize):
    """Traced as (B, h, w, C) with h = w = C = 8, so sizes do not tell the axes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size = 32
        self.embed = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1).flatten(1, 2)
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


class AnySizeUnfold(AnySize):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(nn.functional.unfold(x, 4, stride=4).transpose(1, 2))
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


class CountOnly(AnySize):
    """Takes any image of 16 patches, whatever its aspect ratio."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.pos = nn.Parameter(torch.zeros(1, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.pos
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


def test_grids_follow_the_aspect_ratio():
    gm = papr_fx.transform(enliven(CountOnly()), toy_proposal(), 0.5)
    for height, width in ((16, 16), (8, 32)):
        assert list(papr_fx.keep_masks(gm, torch.randn(2, 3, height, width))) == [(height // 4, width // 4)]


@torch.no_grad()
def test_images_of_another_number_of_patches_are_refused_by_name():
    model = enliven(CountOnly()).eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, verify=False)
    message = r"images of 16 x 16 and others of 16 patches, not 16 x 24: call transform"
    for ask in (gm, lambda x: papr_fx.keep_masks(gm, x)):
        with pytest.raises(papr_fx.ArgumentError, match=message):
            ask(torch.randn(1, 3, 16, 24))
    for height, width in ((8, 32), (18, 17)):  # the rest of the image is cut off
        x = torch.randn(1, 3, height, width)
        assert gm(x).shape == model(x).shape
        assert torch.compile(gm, fullgraph=True, backend="eager")(x).shape == model(x).shape


def test_an_example_that_the_model_itself_refuses():
    with pytest.raises(papr_fx.TraceError, match=r"CountOnly itself does not run on images \(1, 3, 16, 24\): .*example_input"):
        papr_fx.transform(CountOnly().eval(), toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 16, 24))


@pytest.mark.parametrize("build", [AnySize, ChannelsLast, AnySizeUnfold])
def test_grids_follow_the_image(build):
    model = enliven(build()).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    for height, width in ((16, 16), (48, 16), (8, 24)):
        x = torch.randn(2, 3, height, width, dtype=torch.float64)
        ((grid, mask),) = papr_fx.keep_masks(gm, x).items()
        assert grid == (height // 4, width // 4)
        with torch.no_grad():
            assert relative_error(gm(x), at_first_block(model, "blocks.0", kept_tokens(mask, 0), x)) < 1e-12


class Flattened(AnySize):
    """Flattens in a function that the trace does not enter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = hidden_flatten(x, self.embed.weight, self.embed.bias)
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


@torch.fx.wrap
def hidden_flatten(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.conv2d(x, weight, bias, stride=4).flatten(2).transpose(1, 2)


def test_dynamic_image_size_prunes_each_size_by_its_own_grid():
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, dynamic_img_size=True).eval().double()
    enliven(model)
    gm = papr_fx.transform(model, toy_proposal().double(), 0.5)
    for size in ((64, 64), (96, 48)):
        grid = size[0] // 16, size[1] // 16
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        masks = papr_fx.keep_masks(gm, x)
        assert list(masks) == [grid]
        assert masks[grid].flatten(1).sum(1).tolist() == [int((grid[0] * grid[1] + 1) * 0.5)] * 2
        assert gm(x).shape == (2, 1000)


class Located(nn.Module):
    """An embedding that looks rows and columns up: shapes of larger images look right, but their indices are out of range."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 8, 4, 4)
        self.rows, self.columns = nn.Embedding(4, 8), nn.Embedding(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        rows, columns = (torch.arange(size, device=x.device) for size in x.shape[-2:])
        return (x + (self.rows(rows)[:, None] + self.columns(columns)).permute(2, 0, 1)).flatten(2).transpose(1, 2)


class Frozen(Located):
    """Switches gradients inside, so that it cannot be traced through."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class FrozenAnySize(DeepEmbedding):
    """The same without positions: it takes any size, but where its grid is flattened cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


@pytest.mark.parametrize("embedding", [Located, Frozen, FrozenAnySize, None])
@torch.no_grad()
def test_grids_that_are_flattened_out_of_sight(embedding):
    """Where their sizes cannot be read, they are those of the images over those of a patch."""
    model = Flattened() if embedding is None else AnySize()
    if embedding is not None:
        model.embed = embedding()
    model = enliven(model).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 16, 16))
    for size in ((16, 16), (8, 8), (8, 16)):
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        ((grid, mask),) = papr_fx.keep_masks(gm, x).items()
        assert grid == (size[0] // 4, size[1] // 4)
        assert relative_error(gm(x), at_first_block(model, "blocks.0", kept_tokens(mask, 0), x)) < 1e-12


class Rearranging(AnySize):
    """Rearranges its position table for another aspect: a branch on sizes, which a graph does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.pos = nn.Parameter(torch.zeros(1, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        pos = self.pos if x.shape[2] == x.shape[3] else self.pos.flip(1)
        x = x.flatten(2).transpose(1, 2) + pos
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


class Interpolating(Rearranging):
    """Resizes the table for larger images."""

    def forward(self, x: Tensor) -> Tensor:
        h, w = (size // 4 for size in x.shape[-2:])
        pos = self.pos
        if h * w != 16:
            table = pos.view(1, 4, 4, 8).permute(0, 3, 1, 2)
            pos = nn.functional.interpolate(table, (h, w)).flatten(2).transpose(1, 2)
        x = self.embed(x).flatten(2).transpose(1, 2) + pos
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


class Wide(Rearranging):
    """Has other positions for wider images."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        pos = x.flatten(2).transpose(1, 2).mean(2, keepdim=True) * (2 if x.shape[3] > 4 else 1)
        x = x.flatten(2).transpose(1, 2) + pos
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


class Tall(Wide):
    """Has other positions for higher images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(2, 3))


class Pooled(nn.Module):
    """Residual branches of convolutions on a grid that is pooled in large images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(8, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.shape[-2] * x.shape[-1] > 16:
            x = nn.functional.avg_pool2d(x, 2)
        for block in self.blocks:
            x = x + block(x)
        return x.mean((2, 3))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("build", "shape"),
    [(Rearranging, (8, 32)), (Interpolating, (32, 32)), (Wide, (16, 32)), (Tall, (32, 16)), (Pooled, (32, 32))],
)
@pytest.mark.parametrize("z", [0.5, 1.0])
def test_a_size_that_a_graph_does_not_hold_for_is_refused(build, shape, z):
    model = enliven(build()).eval()
    model(torch.zeros(1, 3, *shape))  # the model takes it
    gm = papr_fx.transform(model, toy_proposal(), z, example_input=torch.zeros(1, 3, 16, 16), verify=False)
    assert gm(torch.randn(2, 3, 16, 16)).shape == (2, 8)
    assert torch.compile(gm, backend="eager", fullgraph=True)(torch.randn(2, 3, 16, 16)).shape == (2, 8)
    wrong = f"was transformed for images of 16 x 16, not {shape[0]} x {shape[1]}: call transform with an example_input"
    for module in (gm, copy.deepcopy(gm)):
        with pytest.raises(papr_fx.ArgumentError, match=wrong):
            module(torch.randn(2, 3, *shape))
        with pytest.raises(
            papr_fx.ArgumentError, match=r"takes a batch, 4 axes, not a tensor \(3, 16, 16\); one image is x\[None\]"
        ):
            module(torch.randn(3, 16, 16))


def test_memory_that_runs_out_is_not_an_answer(monkeypatch):
    """Otherwise a model would take other sizes on one machine and not on another."""

    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(sizes, "functional_call", full)
    model = nn.Identity()
    with pytest.raises(torch.OutOfMemoryError):
        sizes.taken_sizes(model, lambda: torch.fx.symbolic_trace(model), torch.zeros(1, 3, 4, 4), "BCHW")
