"""Rows that nobody reads are not computed: against a transcription by hand, and against the model that computes all rows."""

import copy
import re

import pytest
import timm
import torch
import torchvision
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

import papr_fx
from papr_fx.passes.kinds import Kind
from papr_fx.planning.module import sibling
from papr_fx.tracing.numerics import relative_error
from papr_fx.tracing.roles import find_all

from ..models import Attention, Shape, ToyViT, enliven, images, toy_proposal
from ..oracles import kept_tokens

CLASS = Shape(pool="cls")


class Reads(ToyViT):
    """A toy ViT whose head reads the mean of its first rows."""

    def __init__(self, shape: Shape, heads: int, read: int) -> None:
        super().__init__(shape)
        for block in self.blocks:
            block.attn = Attention(8, heads, shape.fused)
        self.read, self.heads = read, heads
        enliven(self)

    def classify(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.head(x[:, 0] if self.read == 1 else x[:, : self.read].mean(1))


def by_hand(model: Reads, keep: Tensor, x: Tensor) -> Tensor:
    """Logits from the tokens `keep` (B, K): the last block answers the queries of the rows that are read, one by one."""
    tokens = torch.stack([sample[rows] for sample, rows in zip(model.tokens(x), keep, strict=True)])
    for block in model.blocks[:-1]:
        tokens = block(tokens)
    last, size = model.blocks[-1], 8 // model.heads
    weights, biases = last.attn.qkv.weight.chunk(3), last.attn.qkv.bias.chunk(3)
    queries, keys, values = (last.norm1(tokens) @ w.T + b for w, b in zip(weights, biases, strict=True))  # (B, K, 8)
    rows = []
    for row in range(model.read):
        mixed = []
        for head in range(model.heads):
            part = slice(head * size, (head + 1) * size)
            scores = torch.einsum("bd,bnd->bn", queries[:, row, part], keys[..., part]) / size**0.5
            mixed.append(torch.einsum("bn,bnd->bd", scores.softmax(1), values[..., part]))
        token = tokens[:, row] + last.attn.proj(torch.cat(mixed, 1))
        rows.append(model.norm(token + last.mlp(last.norm2(token))))
    return model.head(torch.stack(rows).mean(0))


@settings(max_examples=6)
@given(
    prefix=st.integers(1, 3),
    read=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 4]),
    depth=st.integers(1, 2),
    fused=st.booleans(),
    z=st.sampled_from([0.2, 0.5, 0.8]),
)
@torch.no_grad()
def test_a_transcription_by_hand(prefix, read, heads, depth, fused, z):
    read = min(read, prefix)
    shape = Shape(prefix=prefix, depth=depth, fused=fused)
    model = Reads(shape, heads, read).double().eval()
    gm = papr_fx.transform(model, toy_proposal().double(), z, verify=False)
    x = images(shape, 3)
    keep = kept_tokens(next(iter(papr_fx.keep_masks(gm, x).values())), prefix)
    assert papr_fx.report(gm).narrowed == (f"blocks.{depth - 1}", keep.shape[1], read)
    assert relative_error(gm(x), by_hand(model, keep, x)) < 1e-12


class SequenceFirst(nn.Module):
    """A block on tokens (N, B, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(x)


class Transposed(ToyViT):
    """A toy ViT with such blocks."""

    def __init__(self) -> None:
        super().__init__(CLASS)
        self.blocks = nn.ModuleList([SequenceFirst(), SequenceFirst()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x).transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[0])


SMALL = {"depth": 1, "img_size": 64, "num_classes": 5, "embed_dim": 48, "num_heads": 3}
HF = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 64,
    "num_labels": 5,
}
CLIPS = {"num_frames": 4, "tubelet_size": [2, 8, 8], "image_size": 32}


def of_transformers(name: str, **options) -> nn.Module:
    config = getattr(transformers, f"{name.split('For')[0]}Config")(**HF | options)
    return getattr(transformers, name)._from_config(config, attn_implementation="sdpa")


# How a model is made, the block and the number of rows that its last block computes, and options.
MODELS = {
    "class": (lambda: timm.create_model("vit_tiny_patch16_224", attn_drop_rate=0.2, **SMALL), ("blocks.0", 1)),
    "distilled": (lambda: timm.create_model("deit_tiny_distilled_patch16_224", **SMALL), ("blocks.0", 2)),
    "registers": (
        lambda: timm.create_model("vit_small_patch14_reg4_dinov2", **SMALL | {"img_size": 56}),
        ("blocks.0", 1),
    ),
    "CLIP tower": (lambda: timm.create_model("vit_base_patch16_clip_224", **SMALL), ("blocks.0", 1)),
    "rotary": (lambda: timm.create_model("vit_small_patch16_dinov3", global_pool="token", **SMALL), ("blocks.0", 1)),
    "biased": (lambda: timm.create_model("beit_base_patch16_224", global_pool="token", **SMALL), ("blocks.0", 1)),
    "merging": (
        lambda: timm.create_model("vit_tiny_patch16_224", **SMALL),
        ("blocks.0", 1),
        {"merge": papr_fx.Merge(1, "all")},
    ),
    "merging, two": (
        lambda: timm.create_model("deit_tiny_distilled_patch16_224", **SMALL | {"depth": 2}),
        ("blocks.1", 2),
        {"merge": papr_fx.Merge(1, [0])},
    ),
    "sequence first": (Transposed, ("blocks.1", 1)),
    "torchvision": (
        lambda: torchvision.models.VisionTransformer(64, 16, 1, 4, 64, 128, num_classes=5),
        ("encoder.layers.encoder_layer_0", 1),
        {"example_input": torch.zeros(1, 3, 64, 64)},
    ),
    "torchvision, merging": (
        lambda: torchvision.models.VisionTransformer(64, 16, 1, 4, 64, 128, num_classes=5),
        ("encoder.layers.encoder_layer_0", 1),
        {"example_input": torch.zeros(1, 3, 64, 64), "merge": papr_fx.Merge(1, "all")},
    ),
    "transformers": (lambda: of_transformers("ViTForImageClassification"), ("vit.layers.0", 1)),
    "clips": (
        lambda: of_transformers("VivitForVideoClassification", **CLIPS),
        ("vivit.layers.0", 1),
        {"example_input": torch.zeros(1, 4, 3, 32, 32)},
    ),
    "averaged": (lambda: timm.create_model("vit_tiny_patch16_224", global_pool="avg", **SMALL), "reads all rows of `norm`"),
    "attention pool": (lambda: timm.create_model("vit_base_patch16_siglip_224", **SMALL), "no tokens in front of the patches"),
    "features": (
        lambda: timm.create_model("vit_tiny_patch16_224", **SMALL),
        r"\(2, 17, 48\) are returned",
        {"output": "features"},
    ),
    "average beside the class token": (
        lambda: of_transformers("Dinov2WithRegistersForImageClassification", patch_size=16),
        "reads all rows of `dinov2_with_registers_layernorm`",
    ),
}


SLOW = ("biased", "registers", "merging", "attention pool")  # like others


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS])
@torch.no_grad()
def test_outputs_are_those_of_all_rows(name):
    make, wanted, *options = MODELS[name]
    model = enliven(make()).double().eval()
    given = {key: v.double() if isinstance(v, Tensor) else v for key, v in (options or [{}])[0].items()}
    proposal = toy_proposal().double()
    gm = papr_fx.transform(model, proposal, 0.5, verify=False, **given)
    if isinstance(wanted, str):
        whole = papr_fx.transform(model, proposal, 0.5, verify=False, narrow=False, **given)
    else:
        whole = sibling(gm, narrow=False)
    for training in (True, False):
        found = papr_fx.report(gm.train(training))
        assert found.embedding.split(".")[-1] in ("proj", "conv_proj", "projection", "embed"), found.embedding
        assert found.pruned_macs < papr_fx.report(whole.train(training)).pruned_macs
        if isinstance(wanted, str):
            assert found.narrowed is None
            assert re.search(wanted, found.all_rows), found.all_rows
            assert not find_all(gm.graph, Kind.ROWS)
        else:
            assert (found.narrowed[0], found.narrowed[2]) == wanted
    x = torch.randn(3, *gm.example().shape[1:], dtype=torch.float64)
    assert relative_error(gm.eval()(x), whole.eval()(x)) < 1e-12


def test_ratios_modes_and_the_dense_model():
    model = enliven(ToyViT(CLASS)).eval()
    gm = papr_fx.transform(model, toy_proposal(), 1.0)
    x = images(CLASS, 2, dtype=torch.float32)
    assert torch.equal(gm(x), model(x))
    assert papr_fx.report(gm).narrowed is None
    for z in (0.25, 0.6):
        papr_fx.set_keep_ratio(gm, z)
        whole = sibling(gm, narrow=False)
        assert papr_fx.report(gm).narrowed == ("blocks.1", papr_fx.report(gm).sites[0].kept, 1)
        assert relative_error(gm(x), whole(x)) < 1e-5
    papr_fx.set_keep_ratio(gm, 1.0)
    assert torch.equal(gm(x), model(x))
    assert torch.equal(copy.deepcopy(gm)(x), model(x))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_those_of_all_rows(checkpointed):
    model = enliven(timm.create_model("vit_tiny_patch16_224", **SMALL)).train()
    model.set_grad_checkpointing(checkpointed)
    x = torch.randn(2, 3, 64, 64)
    found = []
    for narrow in (True, False):
        gm = papr_fx.transform(copy.deepcopy(model), toy_proposal(), 0.5, narrow=narrow, verify=False)
        gm(x).square().mean().backward()
        found.append({name: p.grad for name, p in gm.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(relative_error(found[0][name], found[1][name]) < 1e-4 for name in found[0])


def test_half_precision_compiled_and_exported():
    model = enliven(ToyViT(CLASS)).eval()
    x = images(CLASS, 2, dtype=torch.float32)
    gm = papr_fx.transform(model, toy_proposal(), 0.5, verify=False)
    expected = gm(x)
    assert relative_error(torch.compile(gm, fullgraph=True, backend=aot_eager)(x), expected) < 1e-5
    program = torch.export.export(gm, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert relative_error(program.module()(x.repeat(2, 1, 1, 1))[:2], expected) < 1e-5
    assert gm(x[:0]).shape == (0, 7)
    assert relative_error(gm.bfloat16()(x.bfloat16()).float(), expected) < 0.2


class Reading(ToyViT):
    """Its last block's code depends on the number of tokens."""

    def __init__(self) -> None:
        super().__init__(CLASS)
        self.blocks[1] = self.Odd(self.blocks[1])

    class Odd(nn.Module):
        """A block around another."""

        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) if len(range(x.shape[1])) != 12 else x


def test_a_block_that_cannot_be_traced_through_stays_whole():
    model = Reading().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    found = papr_fx.report(gm)
    assert found.narrowed is None
    assert "as a Python number or length" in found.all_rows
    assert "blocks.1" not in gm.plan.opened


def test_a_block_with_hooks_stays_whole():
    model = ToyViT(CLASS).eval()
    seen = []
    model.blocks[1].register_forward_hook(lambda _m, _a, out: seen.append(out.shape))
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    assert "model.blocks.1 has forward hooks" in papr_fx.report(gm).all_rows
    seen.clear()
    gm(torch.randn(2, 3, 8, 12))
    assert seen == [(2, papr_fx.report(gm).sites[0].kept, 8)]


def test_a_frozen_block_stays_whole():
    """With dropout in its attention, its code differs by mode, and graphs are of one mode."""
    model = timm.create_model("vit_tiny_patch16_224", attn_drop_rate=0.2, **SMALL).train()
    model.blocks[0].eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, verify=False)
    assert "partly in training mode" in papr_fx.report(gm).all_rows
