"""What counts as a pixel operator: near misses are refused, sound ones are pruned, and the proof finds faults."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import papr_fx
from papr_fx import ops
from papr_fx.dataflow.positionwise import PositionwiseProbe, Verdict
from papr_fx.passes import index_pixels, prune_pixels
from papr_fx.tracing.numerics import relative_error

from ..models import enliven, toy_proposal
from ..models.hierarchical import FAMILIES, Rolled


class Residual(nn.Module):
    """x + branch(x), channels in axis 1."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x):
        return x + self.branch(x)


def user_model(*blocks: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


def mlp():
    return nn.Conv2d(8, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1)


EXAMPLE = torch.zeros(1, 3, 32, 48)

NEAR_MISSES = {
    "norm over space": ((nn.GroupNorm(1, 8), *mlp()), "`1.branch.0` mixes positions"),
    "3x3 convolution": ((nn.Conv2d(8, 8, 3, padding=1), *mlp()), "`1.branch.0` mixes positions"),
    "pooling": ((*mlp(), nn.AvgPool2d(3, 1, 1)), "mixes positions"),
    "layer over the width": ((nn.Linear(12, 12), *mlp()), "failed on the small grid of the probe"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses_name_what_mixes(case):
    branch, message = NEAR_MISSES[case]
    with pytest.raises(papr_fx.NoSiteError, match=message):
        papr_fx.transform(user_model(Residual(*branch)), toy_proposal(), 0.5, example_input=EXAMPLE, mode="pixels")


@torch.no_grad()
def test_what_is_sound_is_pruned_and_the_rest_is_listed():
    depthwise = (nn.Conv2d(8, 8, 3, padding=1, groups=8), *mlp())
    model = user_model(Residual(*mlp()), Residual(nn.GroupNorm(1, 8), *mlp()), Residual(*depthwise)).double()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=EXAMPLE)
    found = papr_fx.report(gm)
    assert [(site.background, site.grid, site.dense, site.kept) for site in found.sites] == [
        ("keep", (8, 12), 96, 48),
        ("zero", (8, 12), 96, 48),
    ]
    assert len(found.left_alone) == 1
    assert "`2.branch.0` mixes positions" in found.left_alone[0]
    assert "left alone" in str(found)
    assert [site.dense_macs for site in found.sites] == [96 * 2 * 8 * 16] * 2
    assert [site.pruned_macs for site in found.sites] == [48 * 2 * 8 * 16] * 2
    x = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    mask = papr_fx.keep_masks(gm, x)[8, 12].double().unsqueeze(1)
    y = model[0](x)
    y = y + mask * model[1].branch(y)
    y = y + model[2].branch(y)
    y = mask * (y + model[3].branch(y))
    assert relative_error(gm(x), model[4:](y)) < 1e-12


def test_batch_norm_is_pruned_in_eval_mode_only():
    """In eval mode it is an affine map of each channel; in training it uses the mean over positions."""
    model = user_model(Residual(*mlp()), Residual(nn.BatchNorm2d(8), *mlp()))
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=EXAMPLE)
    assert len(papr_fx.report(gm).sites) == 2
    assert len(papr_fx.report(gm.train()).sites) == 1


class Grown(nn.Module):
    """A branch that reads a number of positions as a Python integer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        y = self.layer(x.permute(0, 2, 3, 1))
        if y.shape[1] > 3:
            y = y * 2
        return x + y.permute(0, 3, 1, 2)


def test_sizes_read_inside_an_operator_are_refused():
    with pytest.raises(papr_fx.NoSiteError, match="read there as a Python number"):
        papr_fx.transform(user_model(Grown()), toy_proposal(), 0.5, example_input=EXAMPLE)


def test_windowed_models_are_refused_as_tokens():
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, embed_dim=8, depths=(1, 1), num_heads=(2, 2))
    with pytest.raises(papr_fx.PaprError, match="spatial layout|permutation"):
        papr_fx.transform(model.eval(), toy_proposal(), 0.5, mode="tokens")


def test_the_operators_of_a_token_model():
    """Its class token is kept."""
    model = enliven(timm.create_model("vit_tiny_patch16_224", depth=3, img_size=64)).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, mode="pixels")
    assert [(site.name, site.prefix, site.kept) for site in papr_fx.report(gm).sites] == [
        (f"blocks.{block}.mlp", 1, 9) for block in range(3)
    ]
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    (mask,) = papr_fx.keep_masks(gm, x).values()
    rows = torch.cat([torch.ones(2, 1, 1, dtype=torch.float64), mask.flatten(1).unsqueeze(-1)], dim=1)
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda _m, _i, out: out * rows)
    assert relative_error(gm(x), model(x)) < 1e-12


def corrupted_gather(x, rows, grid, layout):
    wrong = rows.clone()
    wrong[0] = rows[1]
    return ops.gather_pixels(x, wrong, grid, layout)


def shifted_write(residual, branch, rows, layout, background):
    return ops.write_pixels(residual, branch.roll(1, -2), rows, layout, background)


@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [
        (prune_pixels, "gather_pixels", corrupted_gather),
        (prune_pixels, "write_pixels", shifted_write),
        (index_pixels, "pixel_rows", lambda keep, grid: keep.reshape(-1)),
    ],
)
def test_the_proof_sees_wrong_indices(monkeypatch, module, name, wrong):
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(papr_fx.VerifyError, match="permutation"):
        papr_fx.transform(FAMILIES["ConvNeXt"].model(), toy_proposal(), 0.5, example_input=torch.zeros(1, 3, 64, 64))


def test_the_proof_sees_a_region_that_mixes_positions(monkeypatch):
    """A norm over space passes every permutation, so the comparison with masked branches must refuse it."""
    model = user_model(Residual(nn.GroupNorm(1, 8), *mlp())).double()

    def trusting(_self, node, layouts):
        layout = layouts[node.all_input_nodes[0]]
        return Verdict(layout if layout == "BCHW" else "")

    monkeypatch.setattr(PositionwiseProbe, "verdict", trusting)
    with pytest.raises(papr_fx.VerifyError, match="regions"):
        papr_fx.transform(model, toy_proposal(), 0.5, example_input=EXAMPLE, mode="pixels")


def test_the_proof_sees_transposed_grids():
    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            y = x.transpose(2, 3).flatten(2).transpose(1, 2)  # (B, N, C), column-major, joined from (columns, rows)
            y = y + self.layer(y)
            return y.transpose(1, 2).unflatten(2, (x.shape[3], x.shape[2])).transpose(2, 3)

    with pytest.raises(papr_fx.VerifyError, match="geometry"):
        papr_fx.transform(user_model(Columns()), toy_proposal(), 0.5, example_input=EXAMPLE, mode="pixels")


def test_positions_out_of_order_are_left_alone():
    """All operators share a grid, but that the first one is in order says nothing about the others."""
    model = enliven(user_model(Rolled(0), Rolled(2), Rolled(0)))
    found = papr_fx.report(papr_fx.transform(model, toy_proposal(), 0.5, example_input=EXAMPLE))
    assert [site.name for site in found.sites] == ["1.mlp", "3.mlp"]
    assert "`2.mlp`: geometry" in found.left_alone[-1]
    with pytest.raises(papr_fx.VerifyError, match="geometry"):
        papr_fx.transform(enliven(user_model(Rolled(2), Rolled(1))), toy_proposal(), 0.5, example_input=EXAMPLE)


class Crossed(nn.Module):
    """Its first branch is computed first but added last."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Sequential(*mlp()), nn.Sequential(*mlp())
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        branch = self.early(x)
        y = self.conv(x)
        y = y + self.late(y)
        return x + branch + y


@torch.no_grad()
def test_branches_that_run_before_they_are_added():
    model = enliven(user_model(Crossed())).double()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=EXAMPLE)
    x = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    mask = papr_fx.keep_masks(gm, x)[16, 8].double().unsqueeze(1)
    y = model[0](x)
    z = model[1].conv(y)
    assert relative_error(gm(x), model[2:](y + mask * model[1].early(y) + z + mask * model[1].late(z))) < 1e-12


class Padded(nn.Module):
    """Pads its grid to a multiple of four before its operator."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(*mlp())

    def forward(self, x):
        y = nn.functional.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        y = y + self.mlp(y)
        return y[:, :, : x.shape[2], : x.shape[3]]


@torch.no_grad()
def test_a_grid_that_other_sizes_would_pad_takes_only_the_traced_size():
    gm = papr_fx.transform(enliven(user_model(Padded())), toy_proposal(), 0.5, example_input=EXAMPLE)
    assert gm(torch.randn(1, *EXAMPLE.shape[1:])).shape == (1, 5)
    with pytest.raises(ValueError, match="was transformed for images of 32 x 48"):
        gm(torch.randn(1, 3, 40, 56))


def test_norms_with_a_square_root_are_positionwise():
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(*mlp())

        def forward(self, x):
            return x + self.mlp(x * torch.rsqrt(x.square().mean(1, keepdim=True)))

    gm = papr_fx.transform(enliven(user_model(Root())), toy_proposal(), 0.5, example_input=EXAMPLE)
    assert len(papr_fx.report(gm).sites) == 1
