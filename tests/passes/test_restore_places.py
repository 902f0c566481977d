"""`restore_places` as it is specified, by hand, and which layouts need it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import papr_fx
from papr_fx.ops import (
    fill_nearest,
    gather_tokens,
    kept_patches,
    map_places,
    resize_map,
    restore_places,
    top_positions,
)
from papr_fx.passes import gather_positions, prune_tokens, splice_proposal
from papr_fx.passes import restore_places as the_pass
from papr_fx.passes.splice_proposal import Selection
from papr_fx.testing import check
from papr_fx.tracing.fakes import scratch_copy
from papr_fx.tracing.numerics import relative_error

from ..models import Attention, Block, Shape, enliven, images, toy_proposal
from ..models.dense import ConvDecoder, DenseViT, by_hand
from ..oracles import kept_tokens
from .specification import Brightness, assert_becomes, graph_of

IMAGES = torch.randn(3, 3, 4, 8)


class Before(nn.Module):
    """A class token, 2 x 4 patches, a block, and a convolution on their grid."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 5, 2, 2)
        self.first = nn.Parameter(torch.randn(1, 1, 5))
        self.block = nn.Sequential(nn.Linear(5, 5), nn.ReLU())
        self.decode = nn.Conv2d(5, 2, 3, padding=1)

    def stream(self, x: Tensor) -> Tensor:
        patches = self.embed(x).flatten(2).transpose(1, 2)  # (B, 8, 5)
        return torch.cat([self.first.expand(x.shape[0], -1, -1), patches], 1)  # (B, 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.block(self.stream(x))[:, 1:]
        return self.decode(tokens.transpose(1, 2).reshape(-1, 5, 2, 4))


class Expected(Before):
    """The same with half of the tokens: the kept ones are put back in their places."""

    def __init__(self) -> None:
        super().__init__()
        self.papr_proposal = Brightness()

    def forward(self, x: Tensor) -> Tensor:
        stream = self.stream(x)
        keep = top_positions(resize_map(self.papr_proposal(x), (2, 4)), 0.5, 1)  # (B, 5)
        patches = kept_patches(keep, 1)  # (B, 4)
        filled = fill_nearest(map_places(patches, (2, 4)), (2, 4))  # (B, 8)
        tokens = self.block(gather_tokens(stream, keep))[:, 1:]
        restored = restore_places(tokens.transpose(1, 2), filled, 2)  # (B, 5, 8)
        return self.decode(restored.reshape(-1, 5, 2, 4))


class ExpectedZero(Expected):
    def forward(self, x: Tensor) -> Tensor:
        stream = self.stream(x)
        keep = top_positions(resize_map(self.papr_proposal(x), (2, 4)), 0.5, 1)
        places = map_places(kept_patches(keep, 1), (2, 4))
        tokens = self.block(gather_tokens(stream, keep))[:, 1:]
        restored = restore_places(tokens.transpose(1, 2), places, 2, zero=True)
        return self.decode(restored.reshape(-1, 5, 2, 4))


@pytest.mark.parametrize(("fill", "expected"), [("nearest", Expected), ("zero", ExpectedZero)])
def test_tokens_are_put_back_where_they_are_laid_out(fill, expected):
    before = Before()
    graph = graph_of(before, IMAGES)
    site = prune_tokens.find_site(graph, ("block",))
    repairs = gather_positions.find_sites(scratch_copy(before), site, ("block",), IMAGES)
    selection = Selection(site.rows.grid, 0.5, site.rows.prefix)
    keep = splice_proposal.rewrite(graph, splice_proposal.find_site(graph), site.stream.next, selection)
    prune_tokens.rewrite(graph, site, keep)
    the_pass.rewrite(graph, repairs.places, the_pass.Places(site.rows, site.rows.grid, keep, fill))
    assert_becomes(before, graph, expected(), IMAGES)


SHAPES = [
    Shape(depth=2),
    Shape(image=(6, 15), depth=1, prefix=0),
    Shape(image=(10, 9), depth=1, prefix=3),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fill", ["nearest", "zero"])
@torch.no_grad()
def test_a_decoder_by_hand(shape, fill):
    model = ConvDecoder(shape).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, restore=fill)
    x = images(shape, 3)
    for ratio in (0.5, 0.15, 0.8):
        papr_fx.set_keep_ratio(gm, ratio)
        assert relative_error(gm(x), by_hand(model, gm, x, zero=fill == "zero")) < 1e-12
        assert relative_error(gm(x), by_hand(model, gm, x, zero=fill != "zero")) > 1e-3
    papr_fx.set_keep_ratio(gm, 1.0)
    assert torch.equal(gm(x), model(x))


class OnGrid(DenseViT):
    """`run` is what its head does on the grid."""

    run = staticmethod(lambda grid: grid)

    def classify(self, x: Tensor) -> Tensor:
        return type(self).run(self.grid(x))


def rows_added(grid: Tensor) -> Tensor:
    return grid + torch.arange(grid.shape[2], device=grid.device, dtype=grid.dtype).view(1, 1, -1, 1)


def halves(grid: Tensor) -> Tensor:
    first, second = grid.chunk(2, dim=1)
    return (first * second.sigmoid()).mean((2, 3))


ON_GRID = {
    "mean": (lambda grid: grid.mean((2, 3)), False),
    "pooling layer": (lambda grid: F.adaptive_avg_pool2d(F.relu(grid), 1).flatten(1), False),
    "maximum": (lambda grid: grid.amax((2, 3)), False),
    "deviation": (lambda grid: grid.std((2, 3)), False),
    "gated halves": (halves, False),
    "weights over all": (lambda grid: (grid * grid.flatten(2).softmax(-1).view_as(grid)).sum((2, 3)), False),
    "channels last": (lambda grid: F.layer_norm(grid.permute(0, 2, 3, 1), (8,)).mean((1, 2)), False),
    "tokens again": (lambda grid: grid.flatten(2).transpose(1, 2), False),
    "the grid": (lambda grid: grid, True),
    "in a dictionary": (lambda grid: {"map": grid}, True),
    "a part of it": (lambda grid: grid[:, :, 1:-1, 1:-1].mean((2, 3)), True),
    "its rows": (lambda grid: grid.mean(3), True),
    "numbered rows": (lambda grid: rows_added(grid).mean((2, 3)), True),
    "softmax over rows": (lambda grid: (grid.softmax(2) * grid).sum((2, 3)), True),
    "windows": (lambda grid: F.avg_pool2d(grid, 2).mean((2, 3)), True),
    "four cells": (lambda grid: F.adaptive_avg_pool2d(grid, 2).flatten(1), True),
    "upsampled": (lambda grid: F.interpolate(grid, scale_factor=2.0).mean((2, 3)), True),
    "padded": (lambda grid: F.pad(grid, (1, 1, 1, 1)).amax((2, 3)), True),
    "moved": (lambda grid: (grid.roll(1, 2) * grid).mean((2, 3)), True),
    "the best place": (lambda grid: grid.flatten(2).argmax(-1), True),
    "strided": (lambda grid: F.conv2d(grid, grid.new_ones(2, 8, 1, 1), stride=2).mean((2, 3)), True),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ON_GRID)
@torch.no_grad()
def test_grids_that_are_only_pooled_stay_columns(name):
    """Outputs are those of the kept tokens alone, or of all places, whatever was decided."""
    run, restored = ON_GRID[name]
    model = OnGrid().double().eval()
    OnGrid.run = staticmethod(run)
    gm = papr_fx.transform(model, toy_proposal(), 0.5, verify=False)
    assert bool(papr_fx.report(gm).restored) == restored
    x = images(model.shape, 2)
    if restored:
        model.on_grid = run
        assert relative_error(gm(x), by_hand(model, gm, x, zero=False)) < 1e-12
        return
    tokens, mask = model.tokens(x), papr_fx.keep_masks(gm, x)[4, 4]
    kept = torch.stack([sample[index] for sample, index in zip(tokens, kept_tokens(mask, 1), strict=True)])
    kept = model.patch_tokens(model.blocks[0](kept))
    assert relative_error(gm(x), run(kept.transpose(1, 2).unsqueeze(-1))) < 1e-12


class Several(DenseViT):
    """One layout is pooled, one is returned, and tokens are returned too."""

    def classify(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.head(self.grid(x).mean((2, 3))), self.grid(x), x


@torch.no_grad()
def test_each_layout_is_judged_by_what_follows_it():
    model = Several().double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    x = images(model.shape, 2)
    pooled, grid, tokens = gm(x)
    assert tokens.shape == (2, 9, 8)
    patches = model.patch_tokens(tokens)
    assert relative_error(pooled, model.head(patches.mean(1))) < 1e-12
    assert torch.equal(grid, papr_fx.restore_grid(gm, patches, x, fill="nearest"))
    assert len(papr_fx.report(gm).restored) == 1
    assert "restored: tokens to their grid 4x4 in `reshape_1`; dropped places hold their nearest" in str(papr_fx.report(gm))
    papr_fx.set_keep_ratio(gm, 1.0)
    assert papr_fx.report(gm).restored == ()


class Between(DenseViT):
    """Mixes neighbours between its blocks, as CPVT does."""

    def make(self) -> None:
        self.mix = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.tokens(x))
        mixed = self.mix(x[:, 1:].transpose(1, 2).reshape(-1, 8, 4, 4)).flatten(2).transpose(1, 2)
        return self.head(self.blocks[1](torch.cat([x[:, :1], mixed], 1)).mean(1))


class Staged(DenseViT):
    """Further blocks run on a coarser grid."""

    def make(self) -> None:
        self.down = nn.Conv2d(8, 8, 2, 2)
        self.later = nn.ModuleList([Block(8, Attention(8, 2, True)) for _ in range(2)])

    def on_grid(self, grid: Tensor) -> Tensor:
        x = self.down(grid).flatten(2).transpose(1, 2)
        for block in self.later:
            x = block(x)
        return self.head(x.mean(1))


class StageInAModule(Staged):
    def make(self) -> None:
        super().make()
        self.stage = nn.Sequential(*self.later)
        del self.later

    def on_grid(self, grid: Tensor) -> Tensor:
        return self.head(self.stage(self.down(grid).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize(("kind", "block"), [(Between, "blocks.1"), (Staged, "later.0"), (StageInAModule, "stage")])
def test_a_grid_that_leads_to_blocks_again_is_refused(kind, block):
    with pytest.raises(papr_fx.NoSiteError, match=f"`{block}` runs on what follows from the grid that `reshape` makes of them"):
        papr_fx.transform(kind(Shape(depth=2)).eval(), toy_proposal(), 0.5, mode="tokens", verify=False)


def test_refusals():
    model = ConvDecoder().eval()
    with pytest.raises(papr_fx.ArgumentError, match="restore must be one of 'nearest', 'zero', not 'mean'"):
        papr_fx.transform(model, toy_proposal(), 0.5, restore="mean")
    with pytest.raises(papr_fx.NoSiteError, match="a merged token has no position"):
        papr_fx.transform(model, toy_proposal(), 0.5, merge=papr_fx.Merge(2), verify=False)


def test_both_modes_train():
    model = ConvDecoder().double().train()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, verify=False)
    x = images(model.shape, 2)
    gm(x).square().mean().backward()
    wanted = copy.deepcopy(model).eval()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (model.mix.weight, model.blocks[0].mlp[0].weight))
    mask = papr_fx.keep_masks(gm, x)[4, 4]
    assert mask.sum() == 2 * 8
    assert relative_error(gm.eval()(x), by_hand(wanted, gm, x, zero=False)) < 1e-12


@torch.no_grad()
def test_checked_by_a_users_suite():
    assert check(ConvDecoder(), toy_proposal(), 0.5).hidden_keys < 1e-12


@torch.no_grad()
def test_compiled_and_exported():
    model = enliven(ConvDecoder()).eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, verify=False)
    x = images(model.shape, 2, dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), gm(x)) < 1e-5
    program = torch.export.export(gm, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    more = images(model.shape, 5, dtype=torch.float32)
    assert relative_error(program.module()(more), gm(more)) < 1e-5


@torch.no_grad()
def test_half_precision():
    gm = papr_fx.transform(ConvDecoder().bfloat16().eval(), toy_proposal(), 0.5)
    assert gm(images(gm.shape, 2, dtype=torch.bfloat16)).isfinite().all()
