"""Token models of clips: against the unpruned models, and against maps computed by hand."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import papr_fx
from benchmarks.clips import PAPER, count
from papr_fx.planning.module import sibling
from papr_fx.testing import check
from papr_fx.tracing.numerics import relative_error

from .models import enliven, toy_proposal
from .models.clips import ClipViT, JointViT, clip_proposal, huggingface
from .oracles import at_first_block, attention_without, kept_by_hand, kept_tokens, resized_by_hand

PREFIX = {"VideoMAEForVideoClassification": 0, "VivitForVideoClassification": 1}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", PREFIX)
@pytest.mark.parametrize("proposal", [clip_proposal, toy_proposal], ids=["whole clips", "each frame"])
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
    assert relative_error(papr_fx.significance(gm, x), maps) < 1e-6  # the proposal folds its batch norm in float32
    ((grid, mask),) = papr_fx.keep_masks(gm, x).items()
    assert grid == (3, 3, 3)
    assert torch.equal(mask, kept_by_hand(resized_by_hand(maps, grid), 0.4, prefix))
    hidden = torch.cat([torch.zeros(3, prefix, dtype=torch.bool), ~mask.flatten(1)], dim=1)
    blocks = model.get_submodule("videomae.encoder.layer" if prefix == 0 else "vivit.layers")
    seen: list[Tensor] = []
    handle = blocks[-1].register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with attention_without(hidden):
        model(x)
    handle.remove()
    kept = seen[0][~hidden].view(3, -1, 32)
    pooled = model.vivit.layernorm(kept)[:, 0] if prefix else model.fc_norm(kept.mean(1))
    assert relative_error(gm(x).logits, model.classifier(pooled)) < 1e-9
    found = papr_fx.report(gm)
    assert found.per_frame == ("on each frame independently" in str(found)) == (proposal is toy_proposal)


@settings(max_examples=8)
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


@settings(max_examples=8)
@given(
    grid=st.tuples(*[st.integers(2, 4)] * 3),
    prefix=st.integers(0, 2),
    batch=st.integers(1, 3),
    ratios=st.lists(st.floats(0.05, 0.95), min_size=3, max_size=3),
)
@torch.no_grad()
def test_hidden_keys_over_shapes(grid, prefix, batch, ratios):
    model = ClipViT(grid, prefix).double().eval()
    example = torch.zeros(1, 3, 2 * grid[0], 4 * grid[1], 3 * grid[2])
    gm = papr_fx.transform(model, clip_proposal(), 0.5, example_input=example, verify=False)
    x = torch.randn((batch, *example.shape[1:]), dtype=torch.float64)
    maps = resized_by_hand(clip_proposal().double().eval()(x).mean(1), grid)
    for z in ratios:
        pruned = sibling(gm, z=z)
        (mask,) = papr_fx.keep_masks(pruned, x).values()
        assert torch.equal(mask, kept_by_hand(maps, z, prefix))
        assert relative_error(pruned(x), at_first_block(model, "blocks.0", kept_tokens(mask, prefix), x)) < 1e-12


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("at_once", [True, False])
def test_frames_that_are_embedded_as_images(prefix, at_once):
    example = torch.zeros(1, 3, 4, 12, 6)
    model = JointViT(prefix, at_once=at_once)
    assert check(model, clip_proposal(), 0.5, example_input=example).hidden_keys < 1e-12
    gm = papr_fx.transform(model.eval(), clip_proposal(), 0.5, example_input=example)
    assert papr_fx.report(gm).sites[0].grid == (4, 3, 2)
    assert list(papr_fx.keep_masks(gm, torch.zeros(2, 3, 2, 12, 12))) == [(2, 3, 4)]  # as many tokens on another grid


def vjepa() -> nn.Module:
    """Its predictor does not run but has the larger blocks; each attention numbers the tokens for its rotary angles."""
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


@pytest.mark.parametrize("model", [pytest.param(name, marks=pytest.mark.slow) for name in PAPER])
def test_multiply_accumulates_of_the_paper(model):
    ours = {("videomae_base", 0.45): 75.6, ("videomae_base", 0.35): 58.6}
    ours |= {("videomae_large", 0.5): 274.1, ("videomae_large", 0.3): 159.9}
    for row in count(model, "x3d_m"):
        # the proposal has 4.73 GMACs, 0.06 of them after its last stage
        assert row["with proposal"] == pytest.approx(ours[model, row["z"]], rel=0.002)
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
