"""Token pruning against oracles that share no code with it: hidden keys, a version by hand, the dense model."""

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import papr_fx
from papr_fx.planning.module import sibling
from papr_fx.testing import check
from papr_fx.tracing.numerics import relative_error

from ..models import Shape, ToyViT, enliven, images, toy_proposal
from ..oracles import count_by_hand


@st.composite
def shapes(draw):
    """ViTs of any shape: 0 to 5 prefix tokens; patches and images need not be square."""
    patch = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    grid = draw(st.tuples(st.integers(2, 5), st.integers(2, 5)))
    prefix = draw(st.integers(0, 5))
    pools = ["avg", "patches", "map"] + (["cls"] if prefix else [])
    return Shape(
        image=(patch[0] * grid[0], patch[1] * grid[1]),
        patch=patch,
        prefix=prefix,
        depth=draw(st.integers(1, 3)),
        pool=draw(st.sampled_from(pools)),
        embed=draw(st.sampled_from(["conv", "linear", "unfold"])),
        fused=draw(st.booleans()),
    )


ratios = st.floats(0.02, 0.999)


def by_hand(model: ToyViT, proposal: nn.Module, x: Tensor, z: float) -> Tensor:
    """Token pruning written out for a toy ViT: one sample at a time, with a sort and Python lists."""
    rows, columns = model.shape.grid
    prefix = model.shape.prefix
    results = []
    for sample in x:
        features = proposal(sample[None])[0]  # (K, h, w)
        psm = F.interpolate(features.mean(0)[None, None], size=(rows, columns), mode="bicubic", align_corners=True).flatten()
        best = psm.argsort(descending=True)[: count_by_hand(rows * columns, z, prefix)].tolist()
        tokens = model.tokens(sample[None])[:, [*range(prefix), *(prefix + i for i in best)]]
        for block in model.blocks:
            tokens = block(tokens)
        results.append(model.classify(tokens))
    return torch.cat(results)


@settings(max_examples=10)
@given(shapes(), st.lists(ratios, min_size=3, max_size=3), st.integers(1, 5), st.integers(0, 9))
@torch.no_grad()
def test_equals_a_transcription_by_hand(shape, several, batch, seed):
    model, proposal = ToyViT(shape).double().eval(), toy_proposal(seed).double().eval()
    x = images(shape, batch, seed)
    gm = papr_fx.transform(model, proposal, 0.5, verify=False)
    for z in several:
        assert relative_error(sibling(gm, z=z)(x), by_hand(model, proposal, x, z)) < 1e-9


@settings(max_examples=8)
@given(shapes(), ratios)
def test_equals_the_model_with_hidden_keys(shape, z):
    if (
        count_by_hand(shape.grid[0] * shape.grid[1], z, shape.prefix) + shape.prefix < 2
    ):  # a single token leaves nothing to corrupt
        z = 0.9
    found = check(ToyViT(shape), toy_proposal(), z)
    assert found.hidden_keys < 1e-9


@settings(max_examples=8)
@given(shapes(), st.integers(1, 5))
def test_z_of_one_is_the_model_to_the_bit(shape, batch):
    model = ToyViT(shape).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 1.0)
    x = images(shape, batch)
    with torch.no_grad():
        assert torch.equal(gm(x), model(x))
    assert not [node for node in gm.graph.nodes if node.name.startswith("papr")]


@settings(max_examples=8)
@given(shapes(), st.integers(1, 5))
def test_all_patches_kept_is_the_model(shape, batch):
    """The gather is then a permutation, and no later operation depends on the order."""
    shape = replace(shape, prefix=shape.prefix + 1)  # int(N * z) then reaches all patches
    model = ToyViT(shape).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.9999, verify=False)
    x = images(shape, batch)
    with torch.no_grad():
        assert all(bool(mask.all()) for mask in papr_fx.keep_masks(gm, x).values())
        assert relative_error(gm(x), model(x)) < 1e-9


TIMM = {
    "class token": {},
    "average beside class token (MAE)": {"global_pool": "avg"},
    "registers": {"reg_tokens": 4},
    "registers only": {"reg_tokens": 3, "class_token": False, "global_pool": "avg"},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "attention pool": {"class_token": False, "global_pool": "map"},
    "position embedding without prefix": {"no_embed_class": True, "reg_tokens": 2},
    "dynamic image size": {"dynamic_img_size": True},
    "padded dynamic image size": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "non-square": {"img_size": (64, 96)},
    "patch 8": {"patch_size": 8, "img_size": 48},
    "patch 14": {"patch_size": 14, "img_size": 56},
    "patch 32": {"patch_size": 32, "img_size": 128},
    "pre-norm and layer scale": {"pre_norm": True, "init_values": 1e-6},
    "one block": {"depth": 1},
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("options", TIMM.values(), ids=TIMM.keys())
def test_timm_vits(options):
    model = timm.create_model("vit_tiny_patch16_224", **{"depth": 2, "img_size": 64, **options})
    found = check(model, toy_proposal(), 0.5)
    assert found.hidden_keys < 1e-9


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_base_patch16_siglip_224", {"embed_dim": 96, "num_heads": 3}),
        ("vit_small_patch14_dinov2", {}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("flexivit_small", {}),
        ("vit_base_patch16_clip_224", {"embed_dim": 96, "num_heads": 3}),
        ("vit_small_patch16_36x1_224", {}),
        ("eva_giant_patch14_224", {"embed_dim": 64, "num_heads": 2}),
        ("cait_xxs24_224", {}),
    ],
)
def test_timm_relatives(name, options):
    patch = 14 if "14" in name else 16
    model = timm.create_model(name, depth=2, img_size=4 * patch, **options)
    assert check(model, toy_proposal(), 0.5).hidden_keys < 1e-9


def test_distilled_model_counts_both_prefix_tokens():
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=1).eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    site = papr_fx.report(gm).sites[0]
    assert (site.prefix, site.dense, site.kept) == (2, 198, 2 + 99)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("patch", "width", "heads"), [(16, 96, 12), (32, 128, 16), (14, 80, 16)])
def test_torchvision_vits(patch, width, heads):
    """The five torchvision models with two narrow blocks each: they differ only in patch, width and depth."""
    model = torchvision.models.VisionTransformer(4 * patch, patch, 2, heads, width, 2 * width)
    assert check(model, toy_proposal(), 0.5).hidden_keys < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"])
def test_torchvision_vits_whole(name):
    model = getattr(torchvision.models, name)().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    x = torch.randn(1, 3, 224, 224)
    papr_fx.set_keep_ratio(gm, 1.0)
    with torch.no_grad():
        assert torch.equal(gm(x), model(x))


class EncoderViT(nn.Module):
    """A ViT around `nn.TransformerEncoder`."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size = 16
        self.proj = nn.Conv2d(3, 16, 4, 4)
        self.pos = nn.Parameter(torch.zeros(1, 16, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).flatten(2).transpose(1, 2) + self.pos
        return self.head(self.encoder(x).mean(1))


class NamedBlocksViT(nn.Module):
    """A ViT whose blocks are attributes instead of a list, and whose dropout is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = ToyViT(Shape(depth=0))
        self.image_size = self.vit.image_size
        self.block_a, self.block_b = (ToyViT(Shape(depth=1)).blocks[0] for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.vit.tokens(x), 0.5, self.training)
        return self.vit.classify(self.block_b(self.block_a(x)))


@pytest.mark.parametrize("build", [EncoderViT, NamedBlocksViT])
def test_users_own_vits(build):
    assert check(enliven(build()), toy_proposal(), 0.5).hidden_keys < 1e-9
