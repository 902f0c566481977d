"""Token merging and its peers: against plain transcriptions, on models of the libraries, and where they are refused."""

import hypothesis
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from hypothesis import strategies as st
from torch import nn

import papr_fx
from papr_fx import peers
from papr_fx.numerics import relative_error
from papr_fx.passes import reduce_tokens

from . import reducers
from .models import Attention, Block, Shape, ToyViT, enliven, images, toy_proposal

DEPTH = 4


def eval_toy(**shape) -> ToyViT:
    return ToyViT(Shape(depth=DEPTH, **shape)).double().eval()


def agree(model, gm, reduce, blocks, *, proportional=True, batch=3):
    x = images(model.shape, batch)
    keeps = [None] * batch
    if gm.plan.z < 1:
        (mask,) = papr_fx.keep_masks(gm, x).values()
        nodes = {node.name: node for node in gm.graph.nodes}
        keeps = papr_fx.trace.cut(gm, gm.graph, nodes["papr_keep"])(x).tolist()
        assert [len(keep) - model.shape.prefix for keep in keeps] == mask.flatten(1).sum(1).tolist()
    expected = [
        reducers.eager(model, image, reduce, blocks, keep=keep, proportional=proportional)
        for image, keep in zip(x, keeps, strict=True)
    ]
    assert relative_error(gm(x), torch.stack(expected)) < 1e-9


@hypothesis.given(
    rows=st.integers(2, 5),
    columns=st.integers(2, 5),
    prefix=st.sampled_from([0, 1, 2, 5]),
    r=st.integers(1, 8),
    z=st.sampled_from([1, 0.6]),
    pool=st.sampled_from(["cls", "avg", "patches"]),
    proportional=st.booleans(),
    blocks=st.sampled_from(["second-half", "all", (0, -1), (2,)]),
)
@hypothesis.settings(max_examples=15, deadline=None)
@torch.no_grad()
def test_merging_against_a_transcription(rows, columns, prefix, r, z, pool, proportional, blocks):
    pool = "avg" if pool == "cls" and not prefix else pool
    model = eval_toy(image=(2 * rows, 3 * columns), prefix=prefix, pool=pool)
    gm = papr_fx.transform(model, toy_proposal(), z, merge=papr_fx.Merge(r, blocks, proportional), verify=False)
    chosen = {"second-half": (2, 3), "all": (0, 1, 2, 3), (0, -1): (0, 3)}.get(blocks, blocks)
    agree(model, gm, reducers.merging(r, prefix), chosen, proportional=proportional)


PEERS = {
    "fusion": (peers.TokenFusion(3, linear_from=2), lambda prefix, grid: reducers.fusion(3, prefix, 2)),
    "attention": (peers.AttentionPruning(3), lambda prefix, grid: reducers.attention_pruning(3, prefix)),
    "propagation": (
        peers.TokenPropagation(3, strength=0.7, edges=2),
        lambda prefix, grid: reducers.propagation(3, prefix, grid, 0.7, 2),
    ),
}


@pytest.mark.parametrize("z", [1, 0.6])
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_peers_against_transcriptions(name, prefix, z):
    reduction, reduce = PEERS[name]
    if name == "attention" and not prefix:
        pytest.skip("needs a class token")
    model = eval_toy(image=(10, 15), prefix=prefix, pool="avg")
    gm = papr_fx.transform(model, toy_proposal(), z, merge=reduction, verify=False)
    agree(model, gm, reduce(prefix, model.shape.grid), range(DEPTH))


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
    x[..., 3:6], x[..., 9:] = x[..., :3], x[..., 6:9]  # every other patch is the one before it again
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


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_models(name):
    """Each is proved by averaging; here also that merged tokens are as many as asked, and that r=0 is the model."""
    model = enliven(MODELS[name]()).eval()
    x = torch.randn(2, 4, 3, 64, 64) if "Video" in name else torch.randn(2, 3, 64, 64)
    gm = papr_fx.transform(model, toy_proposal(), 0.8, example_input=x, merge=papr_fx.Merge(2))
    counts = [node.meta["shape"][1] for node in gm.graph.nodes if node.name.startswith("papr_tokens")]
    assert [counts[i] - counts[i + 1] for i in range(len(counts) - 1)] == [2, 2]
    assert papr_fx.numerics.tensors_of(gm(x))[0].shape == (2, 5)
    alone = papr_fx.transform(model, toy_proposal(), 1, example_input=x, merge=papr_fx.Merge(2, "all"))
    assert relative_error(alone(x), model(x)) > 1e-4
    assert papr_fx.report(alone).total_macs < papr_fx.report(alone).dense_macs


class Summed(ToyViT):
    def classify(self, x):
        return self.head(self.norm(x).sum(1))


class Skips(ToyViT):
    """Adds what entered the first block behind the last."""

    def forward(self, x):
        first = x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.classify(x + first)


class Parallel(Block):
    def forward(self, x):
        return (x + self.attn(self.norm1(x))) + self.mlp(self.norm2(x))


class Masked(Attention):
    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mask = torch.zeros(1, 1, 1, 1, dtype=x.dtype)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(b, n, c))


class Encoder(ToyViT):
    def __init__(self):
        super().__init__(Shape())
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))


def with_blocks(make):
    model = ToyViT(Shape())
    model.blocks = nn.ModuleList(make() for _ in range(2))
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Summed(Shape()), "merging: the output is off"),
        (lambda: Skips(Shape()), "after which nothing reads the tokens from before it"),
        (lambda: ToyViT(Shape(fused=False)), "has no attention over the tokens"),
        (lambda: with_blocks(lambda: Block(8, Masked(8, 2, True))), "is given a mask or a bias"),
        (Encoder, r"torch.nn.TransformerEncoderLayer\) attends to tokens"),
        (lambda: timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=2), "uses positions beyond its embedding"),
        (lambda: timm.create_model("beit_base_patch16_224", img_size=32, depth=2), "uses positions beyond its embedding"),
        (lambda: timm.create_model("convnext_atto"), "keep a spatial layout"),
    ],
    ids=["sum", "skip", "plain softmax", "mask", "torch's encoder", "rotary", "bias", "pixels"],
)
def test_refusals(make, reason):
    with pytest.raises((papr_fx.NoSiteError, papr_fx.VerifyError), match=reason):
        papr_fx.transform(make(), toy_proposal(), 0.5, merge=papr_fx.Merge(2, "all"))


def test_a_parallel_block_merges_behind_both_branches():
    model = with_blocks(lambda: Parallel(8, Attention(8, 2, True)))
    gm = papr_fx.transform(model, toy_proposal(), 1, merge=papr_fx.Merge(2, "all"))
    merges = [node for node in gm.graph.nodes if node.name.startswith("papr_merge")]
    assert [node.args[0].all_input_nodes[0].name.startswith("add") for node in merges] == [True, True]


def test_a_class_token_is_needed_where_its_attention_is():
    with pytest.raises(papr_fx.NoSiteError, match="goes by the attention of a class token"):
        papr_fx.transform(ToyViT(Shape(prefix=0)), toy_proposal(), 0.5, merge=peers.AttentionPruning(2))


@pytest.mark.parametrize(
    ("merge", "options", "reason"),
    [
        (8, {}, "merge must be papr_fx.Merge"),
        (papr_fx.Merge, {}, "merge must be papr_fx.Merge"),
        (papr_fx.Merge(2), {"mode": "pixels"}, "pixel operators have no tokens"),
        (papr_fx.Merge(2, [7]), {}, "no block 7 among 2"),
    ],
)
def test_arguments(merge, options, reason):
    with pytest.raises(papr_fx.ArgumentError, match=reason):
        papr_fx.transform(ToyViT(Shape()), toy_proposal(), 0.5, merge=merge, **options)


@pytest.mark.parametrize("given", [{"r": -1}, {"r": 1.5}, {"r": True}, {"blocks": "first"}, {"blocks": 3}, {"blocks": [0.5]}])
def test_values_of_a_reduction(given):
    with pytest.raises(papr_fx.ArgumentError, match="merge: "):
        papr_fx.Merge(**given)


@pytest.mark.parametrize("fault", ["no bias", "plain mean", "bias of older sizes"])
def test_the_proof_sees_a_fault(monkeypatch, fault):
    if fault == "plain mean":
        monkeypatch.setattr(reduce_tokens, "mean_by_size", lambda x, axis, sizes, **options: x.mean(axis))
    else:
        weigh = reduce_tokens._weigh
        seen = []

        def faulty(graph, attention, sizes, number):
            seen.append(sizes)
            if fault == "bias of older sizes" and number == 1:
                weigh(graph, attention, sizes, number)

        monkeypatch.setattr(reduce_tokens, "_weigh", faulty)
    with pytest.raises(papr_fx.VerifyError, match="merging: the output is off"):
        papr_fx.transform(ToyViT(Shape(depth=DEPTH)), toy_proposal(), 0.5, merge=papr_fx.Merge(2, "all"))


def test_other_keep_ratios_and_copies():
    import copy

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


def test_users_suites_check_it():
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


@pytest.mark.parametrize(("name", "r", "expected"), [("small", 16, 2.19), ("base", 12, 8.21), ("large", 8, 26.33)])
def test_macs_of_the_paper(name, r, expected):
    with torch.device("meta"):
        model = timm.create_model(f"vit_{name}_patch16_224").eval()
    gm = papr_fx.transform(model, timm.create_model("mobileone_s0").eval(), 0.55, merge=papr_fx.Merge(r), verify=False)
    assert papr_fx.report(gm).total_macs / 1e9 == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("merge", [papr_fx.Merge(2), *(reduction for reduction, _ in PEERS.values())], ids=["merge", *PEERS])
@torch.no_grad()
def test_compiled(merge):
    model = ToyViT(Shape(depth=DEPTH)).eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.8, merge=merge)
    torch.compiler.reset()
    fast = torch.compile(gm, fullgraph=True)
    for batch in (2, 3):
        x = images(model.shape, batch, dtype=torch.float32)
        assert relative_error(fast(x), gm(x)) < 1e-4


@torch.no_grad()
def test_attention_stays_fused():
    """With a bias of sizes, one kernel still does an attention: no softmax over scores of its own."""
    model = eval_toy()
    gm = papr_fx.transform(model, toy_proposal(), 0.8, merge=papr_fx.Merge(2, "all"))
    with torch.profiler.profile() as profile:
        gm(images(model.shape, 2))
    names = {event.name for event in profile.events()}
    assert any("flash_attention" in name for name in names)
    assert not any("softmax" in name for name in names)


class Spelled(Attention):
    """Calls attention as users may."""

    def __init__(self, call):
        super().__init__(8, 2, True)
        self.call = call

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(self.call(q, k, v).transpose(1, 2).reshape(b, n, c))


CALLS = {
    "by name": lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v),
    "some by name": lambda q, k, v: F.scaled_dot_product_attention(q, k, value=v),
    "all in order": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0),
    "scaled": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3),
}


@pytest.mark.parametrize("name", CALLS)
def test_ways_to_call_attention(name):
    model = with_blocks(lambda: Block(8, Spelled(CALLS[name]))).double().eval()
    enliven(model)
    gm = papr_fx.transform(model, toy_proposal(), 1, merge=papr_fx.Merge(2, "all"))
    x = images(model.shape, 2)
    assert relative_error(gm(x), model(x)) > 1e-6
    causal = with_blocks(lambda: Block(8, Spelled(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, True))))
    with pytest.raises(papr_fx.NoSiteError, match="is causal"):
        papr_fx.transform(causal, toy_proposal(), 1, merge=papr_fx.Merge(2, "all"))


class Pooled(ToyViT):
    """Averages tokens in one of many ways."""

    def __init__(self, mean):
        super().__init__(Shape(depth=DEPTH))
        self.mean = mean

    def classify(self, x):
        return self.head(self.mean(self.norm(x)))


MEANS = {
    "by name": lambda x: torch.mean(input=x, dim=1),
    "axis": lambda x: x.mean(axis=1),
    "of another type": lambda x: x.mean(1, dtype=torch.float64),
    "kept": lambda x: x.mean((1,), keepdim=True).squeeze(1),
    "turned": lambda x: x.transpose(1, 2).mean(-1),
    "patches, turned": lambda x: x[:, 1:].transpose(1, 2).mean(2),
}


@pytest.mark.parametrize("name", MEANS)
@torch.no_grad()
def test_ways_to_average(name):
    model = Pooled(MEANS[name]).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.8, merge=papr_fx.Merge(2, "all"))
    model.shape = Shape(depth=DEPTH, pool="patches" if "patches" in name else "avg")
    agree(model, gm, reducers.merging(2, 1), range(DEPTH))


class Split(ToyViT):
    """Attention and MLP are lists in a list, and the model adds what they return."""

    def __init__(self):
        super().__init__(Shape())
        norm = lambda part: nn.Sequential(nn.LayerNorm(8), part)  # noqa: E731
        mlp = lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))  # noqa: E731
        self.blocks = nn.ModuleList(nn.ModuleList([norm(Attention(8, 2, True)), norm(mlp())]) for _ in range(3))
        enliven(self)

    def forward(self, x):
        x = self.tokens(x)
        for attention, mlp in self.blocks:
            x = attention(x) + x
            x = mlp(x) + x
        return self.classify(x)


class Twice(ToyViT):
    def forward(self, x):
        x = self.tokens(x)
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return self.classify(x)


def test_blocks_in_parts():
    gm = papr_fx.transform(Split(), toy_proposal(), 0.8, merge=papr_fx.Merge(2, "all"))
    assert [before - after for _, before, after in papr_fx.report(gm).reduced] == [2, 2, 2]
    with pytest.raises(papr_fx.NoSiteError, match="is called several times"):
        papr_fx.transform(Twice(Shape()), toy_proposal(), 0.8, merge=papr_fx.Merge(2, "all"))


@torch.fx.wrap
def attend_keys_first(k, q, v):
    return F.scaled_dot_product_attention(q, k, v)


def test_a_function_around_attention_is_refused():
    model = with_blocks(lambda: Block(8, Spelled(lambda q, k, v: attend_keys_first(k, q, v))))
    with pytest.raises(papr_fx.NoSiteError, match="inside its own code"):
        papr_fx.transform(model, toy_proposal(), 1, merge=papr_fx.Merge(2, "all"))


@pytest.mark.parametrize("options", [{"class_token": True}, {"reg_tokens": 2}], ids=["class token", "registers"])
def test_attention_pooling_over_patches_alone(options):
    model = enliven(small("vit_tiny_patch16_224", global_pool="map", **options)).eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.8, merge=papr_fx.Merge(2))
    assert sum("papr_bias" in node.name for node in gm.graph.nodes) == 2  # in the last block and in the pooling


def test_the_last_block_of_a_class_token_model():
    model = ToyViT(Shape(depth=2, pool="cls")).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.8, merge=papr_fx.Merge(2))
    agree(model, gm, reducers.merging(2, 1), (1,))


def test_multihead_attention_that_cannot_be_spelled_out():
    with pytest.raises(papr_fx.NoSiteError, match="one with dropout"):
        papr_fx.transform(
            torchvision.models.VisionTransformer(64, 16, 2, 2, 32, 48, attention_dropout=0.1),
            toy_proposal(),
            0.5,
            merge=papr_fx.Merge(2),
        )
    hooked = torchvision.models.VisionTransformer(64, 16, 2, 2, 32, 48)
    hooked.encoder.layers[1].self_attention.register_forward_hook(lambda *given: None)
    with pytest.raises(papr_fx.ArgumentError, match="hook"):
        papr_fx.transform(hooked, toy_proposal(), 0.5, merge=papr_fx.Merge(2))


def test_large_tokens_fit_half_precision():
    matching = papr_fx.reduction.match_tokens(torch.randn(1, 2, 8, 4), 4, 0)
    tokens = torch.full((1, 8, 4), 400.0, dtype=torch.float16)
    merged, sizes = papr_fx.reduction.merge_tokens(tokens, torch.full((1, 8), 180.0), matching)
    assert torch.equal(merged, torch.full((1, 4, 4), 400.0, dtype=torch.float16))
    assert int(sizes.sum()) == 8 * 180


@torch.no_grad()
def test_autocast_matches_the_same_tokens():
    keys = 5 + 0.05 * torch.randn(2, 2, 40, 8)
    expected = papr_fx.reduction.match_tokens(keys, 8, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = papr_fx.reduction.match_tokens(keys, 8, 1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda: peers.TokenFusion(linear_from="x"),
        lambda: peers.TokenPropagation(strength=float("inf")),
        lambda: peers.TokenPropagation(edges=2.5),
    ],
)
def test_values_of_peers(make):
    with pytest.raises(papr_fx.ArgumentError, match="merge: "):
        make()
