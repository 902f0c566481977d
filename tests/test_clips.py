"""Clip models and clip proposals: against the unpruned models, and against the maps written out by hand."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.video import r3d_18
from torchvision.models.video.mvit import MSBlockConfig, MViT
from torchvision.models.video.swin_transformer import SwinTransformer3d

import papr_fx
from benchmarks.clips import PAPER, count
from papr_fx.testing import HiddenKeys, check
from papr_fx.tracing.numerics import relative_error

from .models import Attention, Block, Shape, ToyViT, enliven, toy_proposal

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 48}
PREFIX = {"VideoMAEForVideoClassification": 0, "VivitForVideoClassification": 1}


def clip_proposal() -> nn.Sequential:
    """A headless 3-D ConvNet whose map has the clips' own resolution, so that no two scores tie."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4), nn.Tanh(), nn.Conv3d(4, 5, 3, padding=1))


def huggingface(name: str, **options: object) -> nn.Module:
    kind = getattr(transformers, name)
    return enliven(kind._from_config(kind.config_class(**SMALL, num_frames=6, **options))).double().eval()


class ClipViT(nn.Module):
    """A user's own: tubelets of clips (B, C, T, H, W), a class token, positions, two blocks."""

    def __init__(self, grid: tuple[int, int, int], prefix: int) -> None:
        super().__init__()
        self.embed = nn.Conv3d(3, 8, (2, 4, 3), (2, 4, 3))
        self.first = nn.Parameter(torch.zeros(1, prefix, 8))
        self.pos = nn.Parameter(torch.zeros(1, prefix + grid[0] * grid[1] * grid[2], 8))
        self.blocks = nn.ModuleList(Block(8, Attention(8, 2, True)) for _ in range(2))
        self.head = nn.Linear(8, 7)
        enliven(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], dim=1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class JointViT(ClipViT):
    """Embeds every frame as an image, and joins their tokens: at once, or in two steps."""

    def __init__(self, prefix: int, *, at_once: bool) -> None:
        super().__init__((4, 3, 2), prefix)
        self.embed = nn.Conv2d(3, 8, (4, 3), (4, 3))
        self.at_once = at_once
        enliven(self)

    def forward(self, x: Tensor) -> Tensor:
        b, _, t, _, _ = x.shape
        x = self.embed(x.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)  # (B * t, n, C)
        x = x.reshape(b, t * x.shape[1], 8) if self.at_once else x.unflatten(0, (b, t)).flatten(1, 2)
        x = torch.cat([self.first.expand(b, -1, -1), x], dim=1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class PatchMajor(JointViT):
    """The same with the frames of each patch side by side."""

    def forward(self, x: Tensor) -> Tensor:
        b, _, t, _, _ = x.shape
        x = self.embed(x.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
        x = x.unflatten(0, (b, t)).transpose(1, 2).flatten(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def resized_by_hand(maps: Tensor, grid: tuple[int, int, int]) -> Tensor:
    return F.interpolate(maps.unsqueeze(1), grid, mode="trilinear", align_corners=True).squeeze(1)


def kept_by_hand(psm: Tensor, z: float, prefix: int) -> Tensor:
    count = max(1, min(psm[0].numel(), int((psm[0].numel() + prefix) * z)))
    order = psm.flatten(1).argsort(dim=1, descending=True)[:, :count]
    return torch.zeros_like(psm, dtype=torch.bool).flatten(1).scatter(1, order, True).view_as(psm)


@pytest.mark.parametrize("name", PREFIX)
@pytest.mark.parametrize("proposal", [clip_proposal, toy_proposal], ids=["of clips", "of each frame"])
@torch.no_grad()
def test_kept_tokens_are_those_that_the_map_scores_and_equal_the_unpruned_models(name, proposal):
    model, prefix = huggingface(name), PREFIX[name]
    gm = papr_fx.transform(model, proposal(), 0.4)
    x = torch.randn(3, 6, 3, 48, 48, dtype=torch.float64)
    network = proposal().double().eval()
    if proposal is clip_proposal:
        maps = network(x.transpose(1, 2)).mean(1)  # (B, 6, 48, 48)
    else:
        maps = torch.stack([network(x[:, frame]).mean(1) for frame in range(6)], dim=1)
    assert relative_error(papr_fx.significance(gm, x), maps) < 1e-6  # its batch norm was folded in float32
    ((grid, mask),) = papr_fx.keep_masks(gm, x).items()
    assert grid == (3, 3, 3)
    assert torch.equal(mask, kept_by_hand(resized_by_hand(maps, grid), 0.4, prefix))
    hidden = torch.cat([torch.zeros(3, prefix, dtype=torch.bool), ~mask.flatten(1)], dim=1)
    blocks = model.get_submodule("videomae.encoder.layer" if prefix == 0 else "vivit.layers")
    seen: list[Tensor] = []
    handle = blocks[-1].register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with HiddenKeys(hidden):
        model(x)
    handle.remove()
    kept = seen[0][~hidden].view(3, -1, 32)
    pooled = model.vivit.layernorm(kept)[:, 0] if prefix else model.fc_norm(kept.mean(1))
    assert relative_error(gm(x).logits, model.classifier(pooled)) < 1e-9
    found = papr_fx.report(gm)
    assert found.per_frame == ("on each frame alone" in str(found)) == (proposal is toy_proposal)


@settings(max_examples=15)
@given(
    grid=st.tuples(*[st.integers(2, 4)] * 2),
    tubelet=st.integers(1, 2),
    heads=st.integers(1, 2),
    pool=st.booleans(),
    z=st.floats(0.1, 0.95),
    per_frame=st.booleans(),
)
def test_videomaes_of_any_shape(grid, tubelet, heads, pool, z, per_frame):
    steps, rows = grid
    config = transformers.VideoMAEConfig(
        hidden_size=8 * heads,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=24,
        image_size=8 * rows,
        patch_size=8,
        num_frames=4 if steps * tubelet == 3 else steps * tubelet,  # not as many as channels
        tubelet_size=tubelet,
        use_mean_pooling=pool,
    )
    model = enliven(transformers.VideoMAEForVideoClassification._from_config(config))
    if pool:
        assert check(model, toy_proposal() if per_frame else clip_proposal(), z).hidden_keys < 1e-9
        return
    with pytest.raises(papr_fx.VerifyError, match="permutation"):  # its head reads one token by index
        papr_fx.transform(model, clip_proposal(), z)


@pytest.mark.parametrize("name", PREFIX)
@torch.no_grad()
def test_the_whole_clip_model_at_one(name):
    model = huggingface(name)
    gm = papr_fx.transform(model, clip_proposal(), 1.0)
    x = torch.randn(2, 6, 3, 48, 48, dtype=torch.float64)
    assert torch.equal(gm(pixel_values=x).logits, model(x).logits)
    assert all(bool(mask.all()) for mask in papr_fx.keep_masks(gm, x).values())


@given(grid=st.tuples(*[st.integers(2, 4)] * 3), prefix=st.integers(0, 2), batch=st.integers(1, 3), z=st.floats(0.05, 0.95))
def test_hidden_keys_over_shapes(grid, prefix, batch, z):
    model = ClipViT(grid, prefix).double().eval()
    example = torch.zeros(1, 3, 2 * grid[0], 4 * grid[1], 3 * grid[2])
    gm = papr_fx.transform(model, clip_proposal(), z, example_input=example, verify=False)
    x = torch.randn((batch, *example.shape[1:]), dtype=torch.float64)
    with torch.no_grad():
        (mask,) = papr_fx.keep_masks(gm, x).values()
        maps = clip_proposal().double().eval()(x).mean(1)
        assert torch.equal(mask, kept_by_hand(resized_by_hand(maps, grid), z, prefix))
        keep = torch.cat([torch.ones(batch, prefix, dtype=torch.bool), mask.flatten(1)], dim=1)

        def pick(_module, args):
            handle.remove()
            return (args[0][keep].view(batch, -1, 8),)

        handle = model.blocks[0].register_forward_pre_hook(pick)
        assert relative_error(gm(x), model(x)) < 1e-12


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("at_once", [True, False])
def test_frames_that_are_embedded_as_images(prefix, at_once):
    example = torch.zeros(1, 3, 4, 12, 6)
    model = JointViT(prefix, at_once=at_once)
    assert check(model, clip_proposal(), 0.5, example_input=example).hidden_keys < 1e-12
    gm = papr_fx.transform(model.eval(), clip_proposal(), 0.5, example_input=example)
    assert papr_fx.report(gm).sites[0].grid == (4, 3, 2)
    assert list(papr_fx.keep_masks(gm, torch.zeros(2, 3, 2, 12, 12))) == [(2, 3, 4)]  # of as many tokens


def test_frames_side_by_side_are_refused():
    with pytest.raises(papr_fx.PaprError):
        papr_fx.transform(PatchMajor(0, at_once=False), clip_proposal(), 0.5, example_input=torch.zeros(1, 3, 4, 12, 6))


def vjepa() -> nn.Module:
    """Its predictor, which does not run, has the larger blocks; each attention numbers the tokens for its rotary angles."""
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "crop_size": 48, "frames_per_clip": 6}
    predictor = {"pred_hidden_size": 96, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 3}
    config = transformers.VJEPA2Config(**small, **predictor, mlp_ratio=2, num_pooler_layers=1)
    return enliven(transformers.VJEPA2ForVideoClassification._from_config(config)).double().eval()


@pytest.mark.parametrize(
    "make",
    [lambda: ClipViT((2, 3, 4), 1), lambda: huggingface("VivitForVideoClassification"), vjepa],
    ids=["own", "vivit", "vjepa"],
)
def test_every_oracle_of_the_public_check(make):
    model = make()
    example = torch.zeros(1, 3, 4, 12, 12) if isinstance(model, ClipViT) else None
    assert check(model, clip_proposal(), 0.5, example_input=example).hidden_keys < 1e-9


def swin() -> nn.Module:
    torch.manual_seed(0)
    model = SwinTransformer3d(
        patch_size=[2, 4, 4], embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=[2, 3, 3], num_classes=7
    )
    return enliven(model).double().eval()


@pytest.mark.parametrize("background", ["keep", "zero"])
@torch.no_grad()
def test_pixel_operators_equal_the_masked_model(background):
    model = swin()
    example = torch.zeros(1, 3, 6, 32, 48)
    gm = papr_fx.transform(model, clip_proposal(), 0.4, example_input=example, background=background)
    x = torch.randn(2, 3, 6, 32, 48, dtype=torch.float64)
    masks = papr_fx.keep_masks(gm, x)
    maps = clip_proposal().double().eval()(x).mean(1)
    assert list(masks) == [(3, 8, 12), (3, 4, 6)]
    for grid, mask in masks.items():
        assert torch.equal(mask, kept_by_hand(resized_by_hand(maps, grid), 0.4, 0))
    for stage in (0, 2):
        for block in model.features[stage]:

            def forward(x, block=block):
                mask = masks[tuple(x.shape[1:4])].unsqueeze(-1)  # (B, t, h, w, 1)
                x = x + block.attn(block.norm1(x))
                return (x * mask if background == "zero" else x) + block.mlp(block.norm2(x)) * mask

            block.forward = forward
    assert relative_error(gm(x), model(x)) < 1e-12
    other = torch.randn(1, 3, 8, 48, 32, dtype=torch.float64)  # the grid follows the clip
    assert list(papr_fx.keep_masks(gm, other)) == [(4, 12, 8), (4, 6, 4)]


def mvit() -> nn.Module:
    """A class token, attention that pools, a stage of half the rows and columns; the head reads the class token alone."""

    def block(heads: int, width: int, out: int, stride: list[int]) -> MSBlockConfig:
        return MSBlockConfig(heads, width, out, [3, 3, 3], [3, 3, 3], stride, [1, 1, 1])

    torch.manual_seed(0)
    model = MViT(
        spatial_size=(32, 48),
        temporal_size=8,
        block_setting=[block(1, 8, 8, [1, 1, 1]), block(2, 8, 16, [1, 2, 2]), *[block(2, 16, 16, [1, 1, 1])] * 2],
        residual_pool=False,
        residual_with_cls_embed=True,
        rel_pos_embed=False,
        proj_after_attn=False,
        num_classes=7,
    )
    return enliven(model).double().eval()


@torch.no_grad()
def test_pixel_operators_behind_a_class_token():
    model = mvit()
    gm = papr_fx.transform(model, clip_proposal(), 0.4, example_input=torch.zeros(1, 3, 8, 32, 48))
    x = torch.randn(2, 3, 8, 32, 48, dtype=torch.float64)
    masks = papr_fx.keep_masks(gm, x)
    maps = clip_proposal().double().eval()(x).mean(1)
    found = papr_fx.report(gm)
    assert [(site.name, site.grid, site.prefix) for site in found.sites] == [
        ("blocks.0.mlp", (4, 8, 12), 1),
        ("blocks.2.mlp", (4, 4, 6), 1),
        ("blocks.3.mlp", (4, 4, 6), 1),
    ]
    for site in found.sites:
        mask = kept_by_hand(resized_by_hand(maps, site.grid), 0.4, 0)
        assert torch.equal(mask, masks[site.grid])
        rows = F.pad(mask.flatten(1).double(), (1, 0), value=1.0).unsqueeze(-1)  # the class token stays
        model.get_submodule(site.name).register_forward_hook(lambda _m, _i, out, rows=rows: out * rows)
    assert relative_error(gm(x), model(x)) < 1e-12


@torch.no_grad()
def test_operators_whose_positions_do_not_matter_stay_dense():
    model = mvit()
    model.blocks = model.blocks[:3]  # the last grid is that of one block, behind which only the class token is read
    gm = papr_fx.transform(model, clip_proposal(), 0.4, example_input=torch.zeros(1, 3, 8, 32, 48))
    assert [site.name for site in papr_fx.report(gm).sites] == ["blocks.0.mlp"]
    assert "`blocks.2.mlp`: negative control" in str(papr_fx.report(gm))


class IsotropicBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv3d(6, 6, 3, padding=1, groups=6)
        self.mlp = nn.Sequential(nn.Conv3d(6, 12, 1), nn.GELU(), nn.Conv3d(12, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.mix(x))


def test_a_convnext_of_clips_with_one_grid():
    model = nn.Sequential(nn.Conv3d(3, 6, 2, 2), IsotropicBlock(), IsotropicBlock(), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    gm = papr_fx.transform(enliven(model).eval(), clip_proposal(), 0.5, example_input=torch.zeros(1, 3, 8, 12, 12))
    found = papr_fx.report(gm)
    assert (found.mode, {site.background for site in found.sites}) == ("pixels", {"zero"})
    assert check(model, clip_proposal(), 0.5, example_input=torch.zeros(1, 3, 8, 12, 12)).masked_branch < 1e-12


@pytest.mark.parametrize("model", PAPER)
def test_multiply_accumulates_of_the_paper(model):
    ours = {("videomae_base", 0.45): 75.6, ("videomae_base", 0.35): 58.6}
    ours |= {("videomae_large", 0.5): 274.1, ("videomae_large", 0.3): 159.9}
    for row in count(model, "x3d_m"):
        assert row["with proposal"] == pytest.approx(
            ours[model, row["z"]], rel=0.002
        )  # of 4.73 GMACs the proposal spends 0.06 behind its last stage
        assert row["with proposal"] == pytest.approx(row["paper"], rel=0.02)


def test_a_clip_model_compiles_and_exports_as_one_graph():
    model = huggingface("VideoMAEForVideoClassification").float()
    gm = papr_fx.transform(model, clip_proposal(), 0.5, verify=False)
    x = torch.randn(2, 6, 3, 48, 48)
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative_error(compiled(x).logits, gm(x).logits) < 1e-5
        batch = torch.export.Dim("batch", min=2, max=16)
        program = torch.export.export(gm, (x,), dynamic_shapes=({0: batch},))
        more = torch.randn(3, 6, 3, 48, 48)
        assert relative_error(program.module()(more).logits, gm(more).logits) < 1e-5


REFUSED = {
    "frames as many as channels": (
        lambda: papr_fx.transform(ClipViT((2, 3, 4), 0), clip_proposal(), 0.5, example_input=torch.zeros(1, 3, 3, 12, 12)),
        papr_fx.ArgumentError,
        "do not tell frames from the 3 channels",
    ),
    "grey clips": (
        lambda: papr_fx.transform(ClipViT((2, 3, 4), 0), clip_proposal(), 0.5, example_input=torch.zeros(1, 1, 4, 12, 12)),
        papr_fx.ArgumentError,
        "do not tell frames from the 3 channels",
    ),
    "no size": (
        lambda: papr_fx.transform(ClipViT((2, 3, 4), 0), clip_proposal(), 0.5),
        papr_fx.ArgumentError,
        r"torch.zeros\(1, 3, 16, 224, 224\)",
    ),
    "other frames": (
        lambda: papr_fx.transform(ClipViT((2, 3, 4), 0), clip_proposal(), 0.5, example_input=torch.zeros(1, 3, 8, 12, 12)),
        papr_fx.TraceError,
        "cannot be traced",
    ),
    "a clip proposal of an image model": (
        lambda: papr_fx.transform(ToyViT(Shape()), r3d_18(), 0.5),
        papr_fx.ProposalError,
        "takes clips, but the model takes images",
    ),
    "frames in the size of an image": (
        lambda: papr_fx.transform(nn.Conv2d(3, 4, 2), "x", 0.5, example_input=torch.zeros(1, 3, 8, 8), proposal_size=(1, 2, 3)),
        papr_fx.ArgumentError,
        r"proposal_size must be a shorter side in pixels, or \(rows, columns\), each",
    ),
    "divided attention": (
        lambda: papr_fx.transform(huggingface("TimesformerForVideoClassification"), clip_proposal(), 0.5),
        papr_fx.NoSiteError,
        r"flattens a grid of positions \(t, h, w\) of the clips",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    call, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        call()


def test_questions_about_clips_of_another_length_are_refused():
    gm = papr_fx.transform(huggingface("VivitForVideoClassification"), clip_proposal(), 0.5, verify=False)
    for shape in ((1, 4, 3, 48, 48), (1, 3, 6, 48, 48), (1, 6, 3, 64, 64), (1, 3, 48, 48)):
        with pytest.raises(papr_fx.ArgumentError, match="images must be a tensor"):
            papr_fx.keep_masks(gm, torch.zeros(shape, dtype=torch.float64))
