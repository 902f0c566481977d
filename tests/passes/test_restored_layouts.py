"""Ways in which heads lay their tokens out: in modules, by the count, for clips, at any size, of products of tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import papr_fx
from papr_fx.tracing.numerics import relative_error

from ..models import Attention, Block, enliven, images, toy_proposal
from ..models.clips import ClipViT, clip_proposal
from ..models.dense import DenseViT, by_hand, fill_by_hand, filled_by_hand
from ..oracles import kept_tokens


class Layout(DenseViT):
    """`lay_out` is how its head makes a grid of the patches."""

    lay_out = staticmethod(lambda patches: patches)

    def make(self) -> None:
        self.mix = nn.Conv2d(8, 3, 3, padding=1)
        self.unflatten = nn.Sequential(nn.Unflatten(2, self.shape.grid), nn.Conv2d(8, 3, 3, padding=1))

    def classify(self, x: Tensor) -> Tensor:
        return type(self).lay_out(self, self.patch_tokens(x))


LAYOUTS = {
    "reshape": lambda model, x: model.mix(x.transpose(1, 2).reshape(x.shape[0], 8, 4, 4)),
    "view": lambda model, x: model.mix(x.transpose(1, 2).contiguous().view(-1, 8, 4, 4)),
    "unflatten": lambda model, x: model.mix(x.transpose(1, 2).unflatten(2, (4, -1))),
    "channels left open": lambda model, x: model.mix(x.reshape(x.shape[0], 4, 4, -1).permute(0, 3, 1, 2)),
    "rows from the count": lambda model, x: model.mix(x.transpose(1, 2).unflatten(2, (x.shape[1] // 4, 4))),
    "a module": lambda model, x: model.unflatten(x.transpose(1, 2)),
    "pixels of a patch": lambda model, x: x.reshape(-1, 4, 4, 2, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(-1, 2, 8, 8),
    "fold": lambda model, x: F.fold(x.transpose(1, 2), (8, 8), 2, stride=2),
    "a number a token": lambda model, x: x.mean(2).view(-1, 4, 4),
    "all in one row": lambda model, x: x.flatten(1) @ torch.ones(128, 2, dtype=x.dtype),
    "four tokens in one": lambda model, x: x.reshape(-1, 4, 32),
    "stacked": lambda model, x: model.mix(torch.cat([x, 2 * x]).transpose(1, 2).reshape(-1, 8, 4, 4)),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_layouts(name):
    """The model's own head, called on patches that were put back by hand."""
    Layout.lay_out = staticmethod(LAYOUTS[name])
    model = Layout().double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    assert len(papr_fx.report(gm).restored) == 1
    x = images(model.shape, 2)
    model.on_grid = lambda grid: LAYOUTS[name](model, grid.flatten(2).transpose(1, 2))
    assert relative_error(gm(x), by_hand(model, gm, x, zero=False)) < 1e-12


class Counted(Layout):
    """Computes the sides of its grid from the number of its tokens."""

    def classify(self, x: Tensor) -> Tensor:
        tokens = self.norm(x)
        side = int((tokens.shape[1] - 1) ** 0.5)
        return self.on_grid(tokens[:, 1:].transpose(1, 2).reshape(-1, 8, side, side))

    def on_grid(self, grid: Tensor) -> Tensor:
        return self.mix(grid)


@torch.no_grad()
def test_sides_computed_from_the_count():
    model = Counted().double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    x = images(model.shape, 2)
    assert relative_error(gm(x), by_hand(model, gm, x, zero=False)) < 1e-12


class DenseClip(ClipViT):
    """A decoder on the grid of tubelets, (B, C, t, h, w), or on that of each frame, (B * t, C, h, w)."""

    def __init__(self, *, by_frame: bool) -> None:
        super().__init__((3, 2, 4), 1)
        self.by_frame = by_frame
        self.mix = nn.Conv3d(8, 2, 3, padding=1)
        self.mix_frames = nn.Conv2d(8, 2, 3, padding=1)
        enliven(self)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(b, -1, -1), x], dim=1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.decode(x[:, 1:])

    def decode(self, patches: Tensor) -> Tensor:
        if self.by_frame:
            return self.mix_frames(patches.reshape(-1, 2, 4, 8).permute(0, 3, 1, 2))
        return self.mix(patches.transpose(1, 2).reshape(-1, 8, 3, 2, 4))


@pytest.mark.parametrize("by_frame", [False, True])
@torch.no_grad()
def test_clips(by_frame):
    model = DenseClip(by_frame=by_frame).double().eval()
    x = torch.randn(2, 3, 6, 8, 12, dtype=torch.float64)
    gm = papr_fx.transform(model, clip_proposal().double(), 0.4, example_input=x)
    ((grid, mask),) = papr_fx.keep_masks(gm, x).items()
    assert grid == (3, 2, 4)
    with filled_by_hand(model, ["blocks.0", "blocks.1"], mask, 1):
        expected = model(x)
    assert relative_error(gm(x), expected) < 1e-12
    papr_fx.set_keep_ratio(gm, 1.0)
    assert torch.equal(gm(x), model(x))


class AnySize(nn.Module):
    """No positions, and a decoder whose grid follows the images."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList([Block(8, Attention(8, 2, True))])
        self.mix = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.embed(x)
        x = grid.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.mix(x.transpose(1, 2).reshape(grid.shape))


@torch.no_grad()
def test_images_of_any_size():
    model = enliven(AnySize()).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.4, example_input=torch.zeros(1, 3, 16, 16))
    program = torch.export.export(
        gm, (torch.randn(2, 3, 24, 32).double(),), dynamic_shapes=(dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),)
    )
    for height, width in ((16, 16), (24, 40), (40, 12)):
        x = torch.randn(2, 3, height, width, dtype=torch.float64)
        ((_, mask),) = papr_fx.keep_masks(gm, x).items()
        with filled_by_hand(model, ["blocks.0"], mask, 0):
            expected = model(x)
        assert relative_error(gm(x), expected) < 1e-12
        assert relative_error(program.module()(x), expected) < 1e-12


class Segmenter(DenseViT):
    """A decoder of blocks on the kept tokens and one token per class, whose products are laid out at last."""

    def make(self) -> None:
        self.blocks.extend(Block(8, Attention(8, 2, True)) for _ in range(3))
        self.classes = nn.Parameter(torch.zeros(1, 5, 8))
        self.decoder = nn.ModuleList(Block(8, Attention(8, 2, True)) for _ in range(2))

    def classify(self, x: Tensor) -> Tensor:
        patches = self.patch_tokens(x)
        x = torch.cat([patches, self.classes.expand(x.shape[0], -1, -1)], dim=1)
        for block in self.decoder:
            x = block(x)
        masks = x[:, :-5] @ x[:, -5:].transpose(1, 2)  # (B, n, 5)
        return F.interpolate(masks.transpose(1, 2).reshape(-1, 5, 4, 4), scale_factor=2.0, mode="bilinear")


@torch.no_grad()
def test_a_decoder_on_tokens():
    model = Segmenter().double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    x = images(model.shape, 2)
    ((_, mask),) = papr_fx.keep_masks(gm, x).items()
    tokens = torch.stack([sample[index] for sample, index in zip(model.tokens(x), kept_tokens(mask, 1), strict=True)])
    for block in model.blocks:
        tokens = block(tokens)
    tokens = torch.cat([model.patch_tokens(tokens), model.classes.expand(2, -1, -1)], dim=1)
    for block in model.decoder:
        tokens = block(tokens)
    kept = tokens[:, :-5] @ tokens[:, -5:].transpose(1, 2)
    order = mask.flatten(1).long().cumsum(1) - 1
    masks = torch.stack([kept[i, order[i, fill]] for i, fill in enumerate(fill_by_hand(mask))])
    expected = F.interpolate(masks.transpose(1, 2).reshape(-1, 5, 4, 4), scale_factor=2.0, mode="bilinear")
    assert relative_error(gm(x), expected) < 1e-12


class SideBySide(nn.Module):
    """Lays tokens out as rows of half of their number: any number of them will do."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], 2, -1) * 2


class InAModule(DenseViT):
    def make(self) -> None:
        self.lay_out = SideBySide()
        self.lay_out.scale = nn.Parameter(torch.ones(1))  # not a module that only moves values

    def classify(self, x: Tensor) -> Tensor:
        return self.lay_out(self.patch_tokens(x))


@torch.no_grad()
def test_a_module_that_takes_any_number_of_tokens_is_traced_through():
    """Without the proof too: its map would be as long as there are tokens."""
    model = InAModule().double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, verify=False)
    x = images(model.shape, 2)
    assert gm(x).shape == model(x).shape
    model.on_grid = lambda grid: model.lay_out(grid.flatten(2).transpose(1, 2))
    assert relative_error(gm(x), by_hand(model, gm, x, zero=False)) < 1e-12
