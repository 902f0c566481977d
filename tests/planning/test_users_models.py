"""Vision transformers as people write them: what must work, and equal the model run on the kept tokens."""

import functools

import pytest
import timm
import torch
from torch import Tensor, nn

import papr_fx
from papr_fx.testing import check
from papr_fx.tracing.numerics import relative_error

from ..models import Attention, Block, Shape, ToyViT, enliven, images, toy_proposal


def toy(**options) -> ToyViT:
    return ToyViT(Shape(**options))


class SinCos(ToyViT):
    """Positions computed in forward."""

    def __init__(self) -> None:
        super().__init__(Shape())

    def tokens(self, x: Tensor) -> Tensor:
        patches = self.patches(x)
        place = torch.arange(patches.shape[1], device=x.device, dtype=x.dtype)
        waves = torch.outer(place, 0.3 ** torch.arange(4, device=x.device, dtype=x.dtype))
        patches = patches + torch.cat([waves.sin(), waves.cos()], dim=1)
        return torch.cat([self.first.expand(x.shape[0], -1, -1), patches], dim=1)


class InPlace(ToyViT):
    """Position embedding and scale added in place, by statements."""

    def __init__(self) -> None:
        super().__init__(Shape())

    def tokens(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.first.expand(x.shape[0], -1, -1), self.patches(x)], dim=1)
        tokens.add_(self.pos)
        tokens.mul_(1.5)
        return tokens


class BatchNormStem(ToyViT):
    def __init__(self) -> None:
        super().__init__(Shape())
        self.stem = nn.BatchNorm2d(3)

    def patches(self, x: Tensor) -> Tensor:
        return super().patches(self.stem(x))


class Pairs(ToyViT):
    """Attention and MLP of each layer in a list of two."""

    def __init__(self) -> None:
        super().__init__(Shape(depth=0))
        self.layers = nn.ModuleList(
            nn.ModuleList([Attention(8, 2, True), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))]) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for attention, mlp in self.layers:
            x = attention(x) + x
            x = mlp(x) + x
        return self.classify(x)


class TwoLists(ToyViT):
    """Attentions and MLPs in lists of their own; the MLPs are the larger ones."""

    def __init__(self) -> None:
        super().__init__(Shape(depth=0))
        self.attentions = nn.ModuleList(Attention(8, 2, True) for _ in range(2))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            x = x + attention(x)
            x = x + mlp(x)
        return self.classify(x)


class Tied(ToyViT):
    """One block, three times."""

    def __init__(self) -> None:
        super().__init__(Shape(depth=0))
        self.blocks = nn.ModuleList([Block(8, Attention(8, 2, True))] * 3)


class Looped(ToyViT):
    """One block that is no list."""

    def __init__(self) -> None:
        super().__init__(Shape(depth=0))
        self.block = Block(8, Attention(8, 2, True))

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for _ in range(2):
            x = self.block(x)
        return self.classify(x)


class TupleBlock(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


class TupleBlocks(ToyViT):
    """Blocks that return their tokens and something beside."""

    def __init__(self) -> None:
        super().__init__(Shape(depth=0))
        self.blocks = nn.ModuleList(TupleBlock(8, Attention(8, 2, True)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for block in self.blocks:
            x, _ = block(x)
        return self.classify(x)


class OtherFirstBlock(ToyViT):
    """A first block of another width, as models have that widen with depth."""

    def __init__(self) -> None:
        super().__init__(Shape(depth=3, prefix=0))
        self.blocks[0].mlp = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))


class FirstBlock(Block):
    """A block of a class of its own."""


class OtherClassFirst(ToyViT):
    def __init__(self) -> None:
        super().__init__(Shape(depth=3))
        self.blocks[0] = FirstBlock(8, Attention(8, 2, True))


class Normalised(ToyViT):
    def __init__(self) -> None:
        super().__init__(Shape())
        nn.utils.parametrizations.weight_norm(self.blocks[0].attn.qkv)


class Pyramid(nn.Conv2d):
    """Returns a list of maps, as backbones of features do."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x, super().forward(x)]


class HybridEmbedding(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone(x)
        if isinstance(x, list | tuple):
            x = x[-1]
        return x.flatten(2).transpose(1, 2)


class Hybrid(ToyViT):
    """An embedding that asks whether its backbone returns one map or several; no position table."""

    def __init__(self) -> None:
        super().__init__(Shape(prefix=0))
        self.proj = HybridEmbedding(Pyramid(3, 8, self.shape.patch, self.shape.patch))

    def tokens(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Dictionary(ToyViT):
    def __init__(self) -> None:
        super().__init__(Shape())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": super().forward(x)}


def at_first_block(model: nn.Module, name: str, keep: Tensor, x: Tensor) -> Tensor:
    """The model itself, with the tokens `keep` alone handed to the first call of its first block."""

    def pick(_module, args):
        handle.remove()
        return tuple(a.gather(1, keep[..., None].expand(-1, -1, a.shape[-1])) if isinstance(a, Tensor) else a for a in args)

    handle = model.get_submodule(name).register_forward_pre_hook(pick)
    return model(x)


MODELS = {
    SinCos: "blocks.0",
    InPlace: "blocks.0",
    BatchNormStem: "blocks.0",
    Tied: "blocks.0",
    Looped: "block",
    TupleBlocks: "blocks.0",
    OtherFirstBlock: "blocks.0",
    OtherClassFirst: "blocks.0",
    Normalised: "blocks.0",
    Hybrid: "blocks.0",
    Dictionary: "blocks.0",
}


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_equals_the_model_on_the_kept_tokens(build):
    model = enliven(build()).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    prefix = papr_fx.report(gm).sites[0].prefix
    x = torch.randn(3, 3, 8, 12, dtype=torch.float64)
    with torch.no_grad():
        (mask,) = papr_fx.keep_masks(gm, x).values()
        kept = torch.stack([m.flatten().nonzero()[:, 0] for m in mask]) + prefix
        keep = torch.cat([torch.arange(prefix).expand(3, prefix), kept], dim=1)
        assert relative_error(gm(x), at_first_block(model, MODELS[build], keep, x)) < 1e-12


@pytest.mark.parametrize("build", [SinCos, InPlace, Pairs, TwoLists, Tied], ids=lambda build: build.__name__)
def test_kept_tokens_equal_those_of_the_model_with_hidden_keys(build):
    assert check(enliven(build()), toy_proposal(), 0.5).hidden_keys < 1e-9


@pytest.mark.parametrize("training", [False, True])
def test_buffers_of_the_model_stay_as_they_are(training):
    model = BatchNormStem().train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    papr_fx.report(gm)
    papr_fx.graph_diff(model, gm)
    papr_fx.set_keep_ratio(gm, 0.25)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    gm.train()(torch.randn(4, 3, 8, 12))
    assert int(model.stem.num_batches_tracked) == 1  # shared, like all tensors


def test_tracing_leaves_torch_fx_as_it_was():
    papr_fx.transform(SinCos(), toy_proposal(), 0.5)
    assert torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))(torch.zeros(1, 2)).shape == (1, 2)


def test_hooks_on_blocks_see_no_fake_tensors():
    model = toy()
    seen: list[type] = []
    model.blocks[0].register_forward_hook(lambda _m, _i, out: seen.append(type(out)))
    papr_fx.transform(model, toy_proposal(), 0.5)
    assert set(seen) <= {Tensor}


class DeepEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2))
        self.scale = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.patches(x).transpose(1, 2))


class AnySize(nn.Module):
    """No position table, so any image size; the grid is flattened two modules deep."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size = 16
        self.embed = DeepEmbedding()
        self.blocks = nn.ModuleList(Block(8, Attention(8, 2, True)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


class ChannelsLast(AnySize):
    """(B, h, w, C) with h = w = C = 8 when traced: sizes alone do not tell the axes."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size = 32
        self.embed = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1).flatten(1, 2)
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


class AnySizeUnfold(AnySize):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(nn.functional.unfold(x, 4, stride=4).transpose(1, 2))
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


class TablePatches(nn.Conv2d):
    """A patch embedding whose position table is kept by functools, outside of any module."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + table(x.shape[-1])


class CachedTable(ToyViT):
    def __init__(self) -> None:
        super().__init__(Shape())
        self.proj = TablePatches(3, 8, self.shape.patch, self.shape.patch)


@functools.lru_cache
def table(count: int) -> Tensor:
    return torch.linspace(-1, 1, count)


@pytest.mark.parametrize("verify", [False, True])
def test_caches_outside_of_modules_hold_real_tensors(verify):
    table.cache_clear()
    model = CachedTable().eval()
    gm = papr_fx.transform(model, toy_proposal(), 1.0, verify=verify)
    x = torch.randn(2, 3, 8, 12)
    assert type(model(x)) is Tensor
    assert torch.equal(gm(x), model(x))


def test_tensors_computed_and_kept_by_a_module():
    model = toy()
    nn.utils.parametrizations.weight_norm(model.head)
    model.last = model(torch.randn(1, 3, 8, 12))
    assert papr_fx.transform(model, toy_proposal(), 0.5)(torch.randn(2, 3, 8, 12)).shape == (2, 7)


class CountOnly(AnySize):
    """Any image of 16 patches, whatever its aspect."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.pos = nn.Parameter(torch.zeros(1, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.pos
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


def test_grids_follow_the_aspect():
    gm = papr_fx.transform(enliven(CountOnly()), toy_proposal(), 0.5)
    for height, width in ((16, 16), (8, 32)):
        assert list(papr_fx.keep_masks(gm, torch.randn(2, 3, height, width))) == [(height // 4, width // 4)]


@pytest.mark.parametrize("build", [AnySize, ChannelsLast, AnySizeUnfold])
def test_grids_follow_the_image(build):
    model = enliven(build()).double().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    for height, width in ((16, 16), (48, 16), (8, 24)):
        x = torch.randn(2, 3, height, width, dtype=torch.float64)
        ((grid, mask),) = papr_fx.keep_masks(gm, x).items()
        assert grid == (height // 4, width // 4)
        keep = torch.stack([m.flatten().nonzero()[:, 0] for m in mask])
        with torch.no_grad():
            assert relative_error(gm(x), at_first_block(model, "blocks.0", keep, x)) < 1e-12


class Flattened(AnySize):
    """Flattens by a function that hides the grid."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = hidden_flatten(x, self.embed.weight, self.embed.bias)
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


@torch.fx.wrap
def hidden_flatten(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.conv2d(x, weight, bias, stride=4).flatten(2).transpose(1, 2)


def test_a_grid_that_cannot_follow_the_image_is_refused():
    with pytest.raises(papr_fx.NoSiteError, match="takes several image sizes, but the sizes of its grid"):
        papr_fx.transform(Flattened(), toy_proposal(), 0.5)


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "cait_xxs24_224"])
def test_reports_of_models_with_expanded_parameters(name):
    model = timm.create_model(name, depth=2).eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, verify=False)
    found = papr_fx.report(gm)
    assert 0 < found.pruned_macs < found.dense_macs
    assert all(p.requires_grad for p in model.parameters())


def test_report_of_a_meta_model():
    gm = papr_fx.transform(toy().to("meta"), toy_proposal(), 0.5, verify=False)
    real = papr_fx.transform(toy(), toy_proposal(), 0.5)
    assert papr_fx.report(gm) == papr_fx.report(real)


class Doubled(ToyViT):
    """Scales its tokens by a constant that differs in training; with `more`, has one in training alone."""

    def __init__(self, *, more: bool) -> None:
        super().__init__(Shape())
        self.more = more

    def tokens(self, x):
        x = super().tokens(x)
        if self.more:
            return x * torch.tensor([2.0] * 8) if self.training else x
        return x * (torch.tensor(2.0) if self.training else torch.tensor(1.0))


@pytest.mark.parametrize("more", [False, True])
def test_constants_of_training(more):
    model = Doubled(more=more).eval()
    for block in model.blocks:
        block.mlp[2].p = 0.0
    gm = papr_fx.transform(model, toy_proposal(), 1.0)
    x = images(Shape(), 2, dtype=torch.float32)
    assert torch.equal(gm(x), model(x))
    gm.train()
    assert torch.equal(gm(x), model.train()(x))


class Noisy(ToyViT):
    def tokens(self, x):
        return super().tokens(x) + (torch.randn(8) if self.training else torch.zeros(8))


def test_random_numbers_of_a_fixed_size_are_refused():
    with pytest.raises(papr_fx.TraceError, match="draws random numbers of a fixed size in training"):
        papr_fx.transform(Noisy(Shape()), toy_proposal(), 0.5)


class Labels(ToyViT):
    def forward(self, x):
        logits = super().forward(x)
        return {"logits": logits, "label": logits.argmax(1), "sure": logits.amax(1) > 0}


def test_outputs_that_are_no_floating_point_numbers():
    gm = papr_fx.transform(Labels(Shape()).eval(), toy_proposal(), 0.5)
    out = gm(images(Shape(), 2, dtype=torch.float32))
    assert torch.equal(out["label"], out["logits"].argmax(1))
