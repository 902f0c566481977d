"""Tables and biases indexed by position are gathered: against the unpruned model with hidden keys, in float64."""

from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import papr_fx
from papr_fx import ops
from papr_fx.passes import gather_positions
from papr_fx.planning.module import sibling
from papr_fx.testing import check
from papr_fx.tracing.numerics import relative_error

from ..models import Attention, Shape, ToyViT, images, toy_proposal
from ..models.positioned import Numbered, positioned
from ..oracles import with_hidden_keys
from ..versions import ROPE_IN_FLOAT64

SMALL = {"img_size": 64, "embed_dim": 64, "num_heads": 2, "depth": 2}
TIMM = {
    "eva02_tiny_patch14_224": {"img_size": 56},
    "eva02_base_patch16_clip_224": {},
    "vit_small_patch16_dinov3": {},
    "vit_pe_core_tiny_patch16_384": {},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_small_patch16_rope_ape_224": {},
    "beit_base_patch16_224": {},
    "beitv2_base_patch16_224": {},
    "vit_relpos_small_patch16_224": {},
    "vit_relpos_base_patch16_clsgap_224": {},
    "vit_relpos_base_patch32_plus_rpn_256": {"img_size": 128},
    "vit_srelpos_small_patch16_224": {},
    "naflexvit_base_patch16_gap": {},
}


# Their tables are like those of another.
SLOW = (
    *("eva02_tiny_patch14_224", "vit_small_patch16_rope_ape_224", "beitv2_base_patch16_224", "vit_relpos_small_patch16_224"),
    "vit_pe_core_tiny_patch16_384",
)


def marks(name):
    return [ROPE_IN_FLOAT64] * (name == "vit_small_patch16_rope_mixed_224") + [pytest.mark.slow] * (name in SLOW)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in TIMM])
def test_timm_models_with_positions_in_their_blocks(name):
    model = timm.create_model(name, **{**SMALL, **TIMM[name]})
    found = check(model, toy_proposal(), 0.5)
    assert found.hidden_keys < 1e-12 < 1e-3 < found.corrupted


@settings(max_examples=8)
@given(
    st.sampled_from(["rotary", "rotary, four axes", "bias", "bias on scores", "numbered", "numbered patches"]),
    st.tuples(st.integers(2, 5), st.integers(2, 5)),
    st.integers(0, 3),
    st.lists(st.floats(0.3, 0.95), min_size=2, max_size=2),
)
@torch.no_grad()
def test_any_toy_with_positions_in_its_blocks(kind, grid, prefix, ratios):
    """Grids of 2x2 to 5x5, so that axes of 4, 8 and 16 occur both as positions and as channels."""
    shape = Shape(image=(2 * grid[0], 3 * grid[1]), prefix=prefix)
    model = positioned(shape, kind).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    x = images(shape, 3)
    assert torch.equal(sibling(gm, z=1.0)(x), model(x))
    for z in ratios:
        pruned = sibling(gm, z=max(z, 2 / (grid[0] * grid[1])))
        (mask,) = papr_fx.keep_masks(pruned, x).values()
        assert relative_error(pruned(x), with_hidden_keys(model, mask, x)) < 1e-9
        if not mask.all():
            assert relative_error(pruned(x), with_hidden_keys(model, mask.roll(1, 0), x)) > 1e-6


def gathers(gm: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in gm.graph.nodes if node.target is ops.gather_positions]


def test_a_shared_table_is_gathered_once_for_all_blocks():
    for depth in (2, 5):
        model = timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=depth).eval()
        gm = papr_fx.transform(model, toy_proposal(), 0.5, verify=False)
        assert len(gathers(gm)) == 2  # sines and cosines
    model = timm.create_model("vit_srelpos_small_patch16_224", **SMALL).eval()
    assert len(gathers(papr_fx.transform(model, toy_proposal(), 0.5, verify=False))) == 1
    model = timm.create_model("beit_base_patch16_224", **SMALL).eval()
    assert len(gathers(papr_fx.transform(model, toy_proposal(), 0.5, verify=False))) == 2  # a table for each block


def test_all_tokens_and_patches_numbered_in_one_model():
    model = positioned(Shape(prefix=2), "numbered")
    model.blocks[1].attn = Numbered(2)
    assert check(model, toy_proposal(), 0.5).hidden_keys < 1e-12


class RotaryModule(nn.Module):
    """The usual module of rotary angles: it has no children."""

    def forward(self, x: Tensor) -> Tensor:
        angles = (torch.arange(x.shape[2], device=x.device) * 0.4).unsqueeze(1) * torch.arange(1, 5, device=x.device)
        return x * angles.cos() + x.flip(-1) * angles.sin()


class RotaryInAModule(Attention):
    def __init__(self) -> None:
        super().__init__(8, 2, True)
        self.turn = RotaryModule()

    forward = Numbered.forward


class SizeGiven(nn.Module):
    """Numbers its tokens by a size that it receives."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, count: int) -> Tensor:
        return self.block(x.reshape(-1, count, 8) + torch.arange(count, device=x.device).unsqueeze(1) * 0.1)


class HandsSizes(ToyViT):
    def __init__(self) -> None:
        super().__init__(Shape())
        self.blocks = nn.ModuleList(SizeGiven(block) for block in self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x, x.shape[1])
        return self.classify(x)


class Indexed(Attention):
    """Picks all tokens by their numbers, which changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, torch.arange(x.shape[1], device=x.device)])


def with_attention(make) -> ToyViT:
    model = ToyViT(Shape())
    for block in model.blocks:
        block.attn = make()
    return model


@pytest.mark.parametrize(
    "make",
    [lambda: with_attention(RotaryInAModule), HandsSizes, lambda: with_attention(lambda: Indexed(8, 2, True))],
    ids=["in a module without children", "by a size that is handed over", "as an index"],
)
def test_ways_to_number_tokens(make):
    assert check(make(), toy_proposal(), 0.5).hidden_keys < 1e-12


class NumbersInItsHead(ToyViT):
    """Weights each token by its number."""

    def classify(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        weights = torch.arange(n, device=x.device, dtype=x.dtype) / (n * (n - 1) / 2)
        return self.head((self.norm(x) * weights.unsqueeze(1)).sum(1))


def test_a_head_that_numbers_tokens_is_refused():
    with pytest.raises(papr_fx.VerifyError, match="permutation"):
        papr_fx.transform(NumbersInItsHead(Shape()), toy_proposal(), 0.5)


@pytest.mark.parametrize("kind", ["numbered", "numbered patches"])
def test_positions_that_blocks_number_are_gathered_once(kind):
    model = positioned(Shape(prefix=2), kind).eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    assert len(gathers(gm)) == 2  # sines and cosines
    assert len([node for node in gm.graph.nodes if node.target is torch.arange and node.users]) == 1


def test_only_what_fails_is_traced_through():
    gm = papr_fx.transform(positioned(Shape(), "bias").eval(), toy_proposal(), 0.5)
    called = {str(node.target) for node in gm.graph.find_nodes(op="call_module")}
    assert {"blocks.0.mlp", "blocks.1.mlp", "blocks.0.attn.qkv"} <= called
    plain = papr_fx.transform(ToyViT(Shape()).eval(), toy_proposal(), 0.5)
    assert {"blocks.0", "blocks.1"} <= {str(node.target) for node in plain.graph.find_nodes(op="call_module")}


@pytest.mark.parametrize("kind", ["rotary", "bias"])
def test_z_of_one_and_other_ratios(kind):
    model = positioned(Shape(), kind).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 1.0)
    x = images(Shape(), 3)
    with torch.no_grad():
        assert torch.equal(gm(x), model(x))
        papr_fx.set_keep_ratio(gm, 0.4)
        first = gm(x)
        papr_fx.set_keep_ratio(gm, 0.2)
        assert relative_error(gm(x), first) > 1e-3
        papr_fx.set_keep_ratio(gm, 0.4)
        assert torch.equal(gm(x), first)


@pytest.mark.parametrize("kind", ["rotary", "bias"])
def test_training_reaches_tables_and_not_the_proposal(kind):
    model = positioned(Shape(), kind)
    gm = papr_fx.transform(model.train(), toy_proposal(), 0.5)
    gm(images(Shape(), 2, dtype=torch.float32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter is not model.query)
    assert not any(t.requires_grad for t in gm.papr_proposal.buffers())


def wrong_index(value: Tensor, keep: Tensor, axes: list[int], rank: int) -> Tensor:
    return ops.gather_positions(value, keep.roll(1, 1), axes, rank)


@pytest.mark.parametrize("kind", ["rotary", "bias"])
def test_a_wrong_gather_is_caught(kind, monkeypatch):
    monkeypatch.setattr(gather_positions, "gather_positions", wrong_index)
    with pytest.raises(papr_fx.VerifyError, match="permutation"):
        papr_fx.transform(positioned(Shape(), kind), toy_proposal(), 0.5)


class FromTheCount(Attention):
    """Computes positions from the number of tokens as a Python integer, as ConViT does."""

    def forward(self, x: Tensor) -> Tensor:
        side = int(x.shape[1])
        return super().forward(x + torch.arange(side, dtype=x.dtype, device=x.device).view(1, side, 1))


@pytest.mark.parametrize("name", ["convit_tiny", "xcit_nano_12_p16_224", "hiera_tiny_224"])
def test_what_no_gather_mends_is_refused(name):
    model = timm.create_model(name).eval()
    with pytest.raises(papr_fx.NoSiteError, match="gathering cannot repair|refused|spatial layout"):
        papr_fx.transform(model, toy_proposal(), 0.5, mode="tokens")


def test_positions_made_of_the_count_are_refused():
    model = ToyViT(Shape())
    for block in model.blocks:
        block.attn = FromTheCount(8, 2, True)
    with pytest.raises(papr_fx.PaprError):
        papr_fx.transform(model, toy_proposal(), 0.5)


class GridHead(ToyViT):
    """Reshapes its tokens to their grid before it pools them; with `mix`, a convolution runs over the grid."""

    def __init__(self, shape: Shape, *, mix: bool) -> None:
        super().__init__(shape)
        self.mix = nn.Conv2d(8, 8, 3, padding=1) if mix else nn.Identity()

    def classify(self, x: Tensor) -> Tensor:
        rows, columns = self.shape.grid
        grid = self.norm(x)[:, self.shape.prefix :].reshape(x.shape[0], rows, columns, -1)
        return self.head(self.mix(grid.permute(0, 3, 1, 2)).mean((2, 3)))


@pytest.mark.parametrize("prefix", [0, 2])
def test_tokens_laid_out_as_their_grid(prefix):
    found = check(GridHead(Shape(prefix=prefix), mix=False), toy_proposal(), 0.5)
    assert found.hidden_keys < 1e-12
    assert check(GridHead(Shape(prefix=prefix), mix=True), toy_proposal(), 0.5).hidden_keys < 1e-12
    for mix in (False, True):
        gm = papr_fx.transform(GridHead(Shape(prefix=prefix), mix=mix), toy_proposal(), 0.5, verify=False)
        assert bool(papr_fx.report(gm).restored) == mix
