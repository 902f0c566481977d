"""The ways in which users write attention, averages and blocks: merged, or refused with the reason."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import papr_fx
from papr_fx import peers
from papr_fx.tracing.numerics import relative_error

from .. import reducers
from ..models import Attention, Block, Shape, ToyViT, enliven, images, toy_proposal
from ..models.embeddings import Skips
from .test_reduction import DEPTH, agree, small


class Summed(ToyViT):
    def classify(self, x):
        return self.head(self.norm(x).sum(1))


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
        (lambda: Skips(Shape()), "a skip connection carries tokens past it"),
        (lambda: ToyViT(Shape(fused=False)), "has no attention over the tokens"),
        (lambda: with_blocks(lambda: Block(8, Masked(8, 2, True))), "has a mask or a bias"),
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


def test_a_parallel_block_merges_after_both_branches():
    model = with_blocks(lambda: Parallel(8, Attention(8, 2, True)))
    gm = papr_fx.transform(model, toy_proposal(), 1, merge=papr_fx.Merge(2, "all"))
    merges = [node for node in gm.graph.nodes if node.name.startswith("papr_merge")]
    assert [node.args[0].all_input_nodes[0].name.startswith("add") for node in merges] == [True, True]


def test_attention_pruning_needs_a_class_token():
    with pytest.raises(papr_fx.NoSiteError, match="needs the attention of a class token"):
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


class Spelled(Attention):
    """An attention that calls the kernel in a given way."""

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
    """Averages tokens in a given way."""

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


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", MEANS)
@torch.no_grad()
def test_ways_to_average(name):
    model = Pooled(MEANS[name]).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.8, merge=papr_fx.Merge(2, "all"))
    model.shape = Shape(depth=DEPTH, pool="patches" if "patches" in name else "avg")
    agree(model, gm, reducers.Eager(reducers.merging(2, 1), range(DEPTH)))


class Split(ToyViT):
    """Blocks are lists of an attention and an MLP, and the model adds their results."""

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
def test_attention_pooling_over_patches_only(options):
    model = enliven(small("vit_tiny_patch16_224", global_pool="map", **options)).eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.8, merge=papr_fx.Merge(2))
    assert sum("papr_bias" in node.name for node in gm.graph.nodes) == 2  # in the last block and in the pooling


def test_the_last_block_of_a_class_token_model():
    model = ToyViT(Shape(depth=2, pool="cls")).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.8, merge=papr_fx.Merge(2))
    agree(model, gm, reducers.Eager(reducers.merging(2, 1), (1,)))


def test_multihead_attention_that_cannot_be_split_is_refused():
    with pytest.raises(papr_fx.NoSiteError, match="without dropout"):
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
    matching = papr_fx.ops.reduction.match_tokens(torch.randn(1, 2, 8, 4), 4, 0)
    tokens = torch.full((1, 8, 4), 400.0, dtype=torch.float16)
    merged, sizes = papr_fx.ops.reduction.merge_tokens(tokens, torch.full((1, 8), 180.0), matching)
    assert torch.equal(merged, torch.full((1, 4, 4), 400.0, dtype=torch.float16))
    assert int(sizes.sum()) == 8 * 180


@torch.no_grad()
def test_autocast_matches_the_same_tokens():
    keys = 5 + 0.05 * torch.randn(2, 2, 40, 8)
    expected = papr_fx.ops.reduction.match_tokens(keys, 8, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = papr_fx.ops.reduction.match_tokens(keys, 8, 1)
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
