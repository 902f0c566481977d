"""Token merging and its peers: against plain transcriptions, on models of the libraries, copied, exported, compiled."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import hypothesis
import pytest
import timm
import torch
import torchvision
import transformers
from hypothesis import strategies as st

import papr_fx
from papr_fx import peers
from papr_fx.passes import reduce_tokens
from papr_fx.tracing.numerics import relative_error

from .. import reducers
from ..models import Shape, ToyViT, enliven, images, toy_proposal

DEPTH = 4


def eval_toy(**shape) -> ToyViT:
    return ToyViT(Shape(depth=DEPTH, **shape)).double().eval()


def agree(model: ToyViT, gm: papr_fx.planning.module.PrunedModule, eager: reducers.Eager) -> None:
    """Checks a transformed model against the plain transcription, image by image."""
    x = images(model.shape, 3)
    keeps = [None] * len(x)
    if gm.plan.z < 1:
        (mask,) = papr_fx.keep_masks(gm, x).values()
        nodes = {node.name: node for node in gm.graph.nodes}
        keeps = papr_fx.tracing.graphs.cut(gm, gm.graph, nodes["papr_keep"])(x).tolist()
        assert [len(keep) - model.shape.prefix for keep in keeps] == mask.flatten(1).sum(1).tolist()
    expected = [eager.run(model, image, keep) for image, keep in zip(x, keeps, strict=True)]
    assert relative_error(gm(x), torch.stack(expected)) < 1e-9


@dataclass(frozen=True)
class Merged:
    """A toy ViT whose tokens are merged."""

    grid: tuple[int, int]
    prefix: int
    pool: str
    z: float
    r: int
    proportional: bool
    blocks: str | Sequence[int]


MERGED = st.builds(
    Merged,
    grid=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    prefix=st.sampled_from([0, 1, 2, 5]),
    pool=st.sampled_from(["cls", "avg", "patches"]),
    z=st.sampled_from([1, 0.6]),
    r=st.integers(1, 8),
    proportional=st.booleans(),
    blocks=st.sampled_from(["second-half", "all", (0, -1), (2,)]),
)


@hypothesis.given(MERGED)
@hypothesis.settings(max_examples=6, deadline=None)
@torch.no_grad()
def test_merging_against_a_transcription(case):
    pool = "avg" if case.pool == "cls" and not case.prefix else case.pool
    model = eval_toy(image=(2 * case.grid[0], 3 * case.grid[1]), prefix=case.prefix, pool=pool)
    merge = papr_fx.Merge(case.r, case.blocks, case.proportional)
    gm = papr_fx.transform(model, toy_proposal(), case.z, merge=merge, verify=False)
    chosen = {"second-half": (2, 3), "all": (0, 1, 2, 3), (0, -1): (0, 3)}.get(case.blocks, case.blocks)
    agree(model, gm, reducers.Eager(reducers.merging(case.r, case.prefix), chosen, case.proportional))


PEERS = {
    "fusion": (peers.TokenFusion(3, linear_from=2), lambda prefix, grid: reducers.fusion(3, prefix, 2)),
    "attention": (peers.AttentionPruning(3), lambda prefix, grid: reducers.attention_pruning(3, prefix)),
    "propagation": (
        peers.TokenPropagation(3, strength=0.7, edges=2),
        lambda prefix, grid: reducers.propagation(3, prefix, grid, 0.7, 2),
    ),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("z", [1, 0.6])
@pytest.mark.parametrize(
    ("name", "prefix"),
    [(name, prefix) for name in PEERS for prefix in (0, 1, 2) if prefix or name != "attention"],  # it needs a class token
)
@torch.no_grad()
def test_peers_against_transcriptions(name, prefix, z):
    reduction, reduce = PEERS[name]
    model = eval_toy(image=(10, 15), prefix=prefix, pool="avg")
    gm = papr_fx.transform(model, toy_proposal(), z, merge=reduction, verify=False)
    agree(model, gm, reducers.Eager(reduce(prefix, model.shape.grid), range(DEPTH)))


def test_merging_nothing_is_the_model_to_the_bit():
    model, x = eval_toy(), images(Shape(), 3)
    gm = papr_fx.transform(model, toy_proposal(), 1, merge=papr_fx.Merge(0))
    assert torch.equal(gm(x), model(x))
    papr_fx.set_keep_ratio(gm, 0.5)
    assert torch.equal(gm(x), papr_fx.transform(model, toy_proposal(), 0.5)(x))


@pytest.mark.parametrize("pool", ["cls", "avg"])
@torch.no_grad()
def test_merging_equal_tokens_changes_nothing(pool):
    model = eval_toy(image=(8, 12), pool=pool)
    model.pos.zero_()
    x = images(model.shape, 2)
    x[..., 3:6], x[..., 9:] = x[..., :3], x[..., 6:9]  # every second patch repeats the one before it
    equal = papr_fx.transform(model, toy_proposal(), 1, merge=papr_fx.Merge(4, [0]))
    plain = papr_fx.transform(model, toy_proposal(), 1, merge=papr_fx.Merge(4, [0], proportional=False))
    assert relative_error(equal(x), model(x)) < 1e-12
    assert relative_error(plain(x), model(x)) > 1e-3


def hf(name, **config):
    kind = getattr(transformers, f"{name}Config")(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=64,
        patch_size=16,
        num_labels=5,
        **config,
    )
    return getattr(transformers, f"{name}ForImageClassification")(kind)


def small(name, **options):
    return timm.create_model(name, img_size=64, depth=4, embed_dim=32, num_heads=2, num_classes=5, **options)


MODELS = {
    "class token": lambda: small("vit_tiny_patch16_224"),
    "average": lambda: small("vit_tiny_patch16_224", global_pool="avg"),
    "no class token": lambda: small("vit_base_patch16_224", global_pool="avg", class_token=False),
    "registers": lambda: small("vit_small_patch16_224", reg_tokens=4),
    "distilled": lambda: small("deit_tiny_distilled_patch16_224"),
    "attention pooling": lambda: small("vit_base_patch16_siglip_224"),
    "queries and keys normed": lambda: small("vit_tiny_patch16_224", qk_norm=True),
    "layer scale": lambda: small("vit_tiny_patch16_224", init_values=1.0),
    "several sizes": lambda: small("vit_tiny_patch16_224", dynamic_img_size=True),
    "torchvision": lambda: torchvision.models.VisionTransformer(64, 16, 4, 2, 32, 48, num_classes=5),
    "transformers ViT": lambda: hf("ViT"),
    "transformers DeiT": lambda: hf("DeiT"),
    "transformers DINOv2": lambda: hf("Dinov2"),
    "transformers VideoMAE": lambda: transformers.VideoMAEForVideoClassification(
        transformers.VideoMAEConfig(
            image_size=64,
            patch_size=16,
            num_frames=4,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=48,
            num_labels=5,
        )
    ),
}


# One of each form: a class token, an average, prefix tokens, a map head, another library, clips.
QUICK = ("class token", "average", "registers", "attention pooling", "torchvision", "transformers DINOv2")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS])
@torch.no_grad()
def test_models(name):
    """Beside the proof of each transform: as many tokens are merged as asked, and merging without pruning saves MACs."""
    model = enliven(MODELS[name]()).eval()
    x = torch.randn(2, 4, 3, 64, 64) if "Video" in name else torch.randn(2, 3, 64, 64)
    gm = papr_fx.transform(model, toy_proposal(), 0.8, example_input=x, merge=papr_fx.Merge(2))
    counts = [node.meta["shape"][1] for node in gm.graph.nodes if node.name.startswith("papr_tokens")]
    assert [counts[i] - counts[i + 1] for i in range(len(counts) - 1)] == [2, 2]
    assert papr_fx.tracing.numerics.tensors_of(gm(x))[0].shape == (2, 5)
    unpruned = papr_fx.transform(model, toy_proposal(), 1, example_input=x, merge=papr_fx.Merge(2, "all"))
    assert relative_error(unpruned(x), model(x)) > 1e-4
    assert papr_fx.report(unpruned).total_macs < papr_fx.report(unpruned).dense_macs


@pytest.mark.parametrize(
    ("fault", "said"),
    [("no bias", "does not weigh"), ("plain mean", "the output is off"), ("bias of older sizes", "does not weigh")],
)
def test_the_proof_finds_a_fault(monkeypatch, fault, said):
    if fault == "plain mean":
        monkeypatch.setattr(reduce_tokens, "mean_by_size", lambda x, axis, sizes, **options: x.mean(axis))
    else:
        weigh = reduce_tokens._weight
        seen = []

        def faulty(graph, attention, sizes, ends, number):
            seen.append(sizes)
            if fault == "bias of older sizes" and number == 1:
                weigh(graph, attention, sizes, ends, number)

        monkeypatch.setattr(reduce_tokens, "_weight", faulty)
    with pytest.raises(papr_fx.VerifyError, match=f"merging: .*{said}"):
        papr_fx.transform(ToyViT(Shape(depth=DEPTH)), toy_proposal(), 0.5, merge=papr_fx.Merge(2, "all"))


def test_other_keep_ratios_and_copies():
    model = eval_toy()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, merge=papr_fx.Merge(2))
    x = images(model.shape, 2)
    for z in (1.0, 0.7):
        papr_fx.set_keep_ratio(gm, z)
        fresh = papr_fx.transform(model, toy_proposal(), z, merge=papr_fx.Merge(2))
        assert torch.equal(gm(x), fresh(x))
    assert torch.equal(copy.deepcopy(gm)(x), gm(x))


def test_reported():
    gm = papr_fx.transform(eval_toy(), toy_proposal(), 0.8, merge=papr_fx.Merge(2))
    assert papr_fx.report(gm).reduced == (("blocks.2", 14, 12), ("blocks.3", 12, 10))
    assert "reduced: 14 tokens to 10, in 2 blocks from `blocks.2` to `blocks.3`" in str(papr_fx.report(gm))
    assert papr_fx.report(papr_fx.transform(eval_toy(), toy_proposal(), 0.8, verify=False)).reduced == ()


def test_the_check_for_users_covers_merging():
    assert papr_fx.testing.check(eval_toy(), toy_proposal(), 0.5, merge=papr_fx.Merge(2)).hidden_keys < 1e-12


@torch.no_grad()
def test_exported():
    model = ToyViT(Shape(depth=DEPTH)).eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.8, merge=papr_fx.Merge(2))
    x = images(model.shape, 3, dtype=torch.float32)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(gm, (x,), dynamic_shapes=({0: batch},))
    larger = images(model.shape, 5, seed=2, dtype=torch.float32)
    assert relative_error(program.module()(larger), gm(larger)) < 1e-5


def test_features_cannot_be_put_back_on_the_grid():
    model = small("vit_tiny_patch16_224").eval()
    x = torch.randn(1, 3, 64, 64)
    gm = papr_fx.transform(model, toy_proposal(), 0.8, merge=papr_fx.Merge(2), output="features")
    with pytest.raises(papr_fx.ArgumentError, match="merged"):
        papr_fx.restore_grid(gm, gm(x), x)


@pytest.mark.parametrize(
    ("name", "r", "expected"),
    [("small", 16, 2.19), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("base", 12, 8.21), ("large", 8, 26.33)))],
)
def test_macs_of_the_paper(name, r, expected):
    model = timm.create_model(f"vit_{name}_patch16_224").eval().to("meta")
    gm = papr_fx.transform(
        model, timm.create_model("mobileone_s0").eval(), 0.55, merge=papr_fx.Merge(r), narrow=False, verify=False
    )
    assert papr_fx.report(gm).total_macs / 1e9 == pytest.approx(expected, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "merge",
    [
        pytest.param(papr_fx.Merge(2, "all"), id="merge"),
        *(pytest.param(reduction, id=name) for name, (reduction, _) in PEERS.items()),
    ],
)
@torch.no_grad()
def test_compiled(merge):
    model = ToyViT(Shape(depth=2)).eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.8, merge=merge, verify=False)
    torch.compiler.reset()
    x = images(model.shape, 2, dtype=torch.float32)
    assert relative_error(torch.compile(gm, fullgraph=True)(x), gm(x)) < 1e-4


@torch.no_grad()
def test_attention_stays_fused():
    """With a bias of sizes, attention is still one fused kernel, without a softmax of its own."""
    model = eval_toy()
    gm = papr_fx.transform(model, toy_proposal(), 0.8, merge=papr_fx.Merge(2, "all"))
    with torch.profiler.profile() as profile:
        gm(images(model.shape, 2))
    names = {event.name for event in profile.events()}
    assert any("flash_attention" in name for name in names)
    assert not any("softmax" in name for name in names)
