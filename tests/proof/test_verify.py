"""The proof: it passes what is right, and each part of it catches the fault that it is there for."""

import math
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import papr_fx
from papr_fx import ops
from papr_fx.passes import prune_tokens
from papr_fx.proof.prove import prove
from papr_fx.tracing.numerics import redraw

from ..models import Attention, Shape, ToyViT, enliven, toy_proposal


class BiasedAttention(Attention):
    """A relative-position bias of zeros, as BEiT starts with, hidden behind a module that takes any length."""

    def __init__(self, count: int) -> None:
        super().__init__(8, 2, fused=False)
        self.table = nn.Parameter(torch.zeros(2, count, count))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        n = q.shape[-2]
        return super().scores(q, k) + self.table[:, :n, :n]


class RebuiltPositions(Attention):
    """Positions had by counting the tokens."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k) + torch.ones_like(k[..., 0]).cumsum(-1).unsqueeze(-2) / 8


class LengthAware(Attention):
    """Right with all 17 tokens; with fewer, it looks at their order."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        drift = torch.ones_like(k[..., 0]).cumsum(-1).unsqueeze(-2) / 8 if k.shape[-2] < 17 else 0.0
        return super().scores(q, k) + drift


def with_attention(make) -> ToyViT:
    model = ToyViT(Shape()).eval()
    for block in model.blocks:
        block.attn = make()
    return model


class PicksAToken(ToyViT):
    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x[:, 3]))


class ColumnMajor(ToyViT):
    def patches(self, x: Tensor) -> Tensor:
        return self.proj(x).transpose(2, 3).flatten(2).transpose(1, 2)


class FrozenBatch(ToyViT):
    def tokens(self, x: Tensor) -> Tensor:
        batch = int(x.shape[0])
        first = self.first.expand(batch, -1, -1).contiguous()
        return torch.cat([first, self.patches(x)[:batch]], dim=1) + self.pos if batch == 2 else super().tokens(x) * 2


class Windowed(ToyViT):
    """Attention in windows of neighbours: any even number of tokens is accepted in silence."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        b, n, c = x.shape
        for block in self.blocks:
            x = block(x)
        pairs = x[:, : n // 2 * 2].reshape(b, n // 2, 2, c).amax(2)
        return self.head(self.norm(pairs).mean(1))


class Deaf(ToyViT):
    """Ignores its tokens."""

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)[:, 0] * 0 + self.query[:, 0])


class Faint(ToyViT):
    """What its tokens do to the output drowns in the noise of float32."""

    def classify(self, x: Tensor) -> Tensor:
        return self.query.sum() + 1e-6 * super().classify(x)


class FaintlyPicksAToken(PicksAToken):
    def classify(self, x: Tensor) -> Tensor:
        return self.query.sum() + 1e-6 * super().classify(x)


class CountsTokens(ToyViT):
    """Reads the number of tokens as a Python number behind the blocks, where pruning changes it."""

    def __init__(self, read) -> None:
        super().__init__(Shape())
        self.read = read

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).sum(1) / self.read(x))


class TrainingOnly(ToyViT):
    """Right in eval mode; in training its head picks a token by index."""

    def __init__(self) -> None:
        super().__init__(Shape())

    def classify(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x[:, 3])) if self.training else super().classify(x)


class FrozenAtOne(ToyViT):
    def tokens(self, x: Tensor) -> Tensor:
        return super().tokens(x) * (2 if x.shape[0] == 1 else 1)


CAUGHT = {
    "training mode": (TrainingOnly, "in training mode"),
    "batch size of one": (lambda: FrozenAtOne(Shape()), "tracing"),
    "zero bias table": (lambda: with_attention(lambda: BiasedAttention(17)), "permutation: .*norm|permutation"),
    "positions from the length": (lambda: with_attention(lambda: RebuiltPositions(8, 2, False)), "permutation"),
    "order matters when shorter": (lambda: with_attention(lambda: LengthAware(8, 2, False)), "lengths"),
    "head by index": (lambda: PicksAToken(Shape()), "permutation"),
    "column-major tokens": (lambda: ColumnMajor(Shape()), "geometry: changing patch"),
    "frozen batch size": (lambda: FrozenBatch(Shape()), "tracing"),
    "windows": (lambda: Windowed(Shape()), "permutation"),
    "no effect": (lambda: Deaf(Shape()), "negative control"),
    "faint, and by index": (lambda: FaintlyPicksAToken(Shape()), "permutation"),
}


READS = {
    "int": lambda x: int(x.shape[1]),
    "float": lambda x: float(x.shape[1]),
    "index": lambda x: len(range(x.shape[1])),
    "len": lambda x: len(x[0]),
    "branch": lambda x: 1 if x.shape[1] > 12 else 3,
    "min": lambda x: min(x.shape[1], 12),
    "loop": lambda x: sum(1 for _ in x[0]),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_a_number_of_tokens_frozen_by_tracing_is_refused(read, verify):
    with pytest.raises(papr_fx.NoSiteError, match="reads .* as a Python number"):
        papr_fx.transform(CountsTokens(read), toy_proposal(), 0.5, verify=verify)


@pytest.mark.parametrize(
    "read", [lambda x: x.shape[1], lambda x: x.ndim, lambda x: int(x.shape[2]), lambda x: math.sqrt(x.shape[1])]
)
def test_sizes_that_stay_in_the_graph_are_not(read):
    papr_fx.transform(CountsTokens(read), toy_proposal(), 0.5)


@pytest.mark.parametrize("case", CAUGHT)
def test_faults_are_caught(case):
    make, message = CAUGHT[case]
    with pytest.raises(papr_fx.VerifyError, match=message):
        papr_fx.transform(make(), toy_proposal(), 0.5)


class Augmented(nn.Module):
    """Positions that are augmented in training, asked for by a method of another name than forward."""

    def table(self, like: Tensor) -> Tensor:
        return like * torch.rand_like(like[:1]) if self.training else like


class AugmentedInTraining(ToyViT):
    def __init__(self) -> None:
        super().__init__(Shape())
        self.rope = Augmented()

    def tokens(self, x: Tensor) -> Tensor:
        return super().tokens(x) + self.rope.table(self.pos)


def test_methods_that_differ_in_training():
    model = AugmentedInTraining().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    x = torch.randn(2, 3, 8, 12)
    assert torch.equal(gm(x), gm(x))
    gm.train()
    for module in gm.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    assert not torch.equal(gm(x), gm(x))


def test_the_proof_of_a_sound_rewrite():
    model = ToyViT(Shape()).double().eval()
    found = prove(model, papr_fx.transform(model, toy_proposal(), 0.5, verify=False))
    assert max(found.permutation, found.order) < 1e-12
    assert found.control > 1e-3


def test_a_model_that_float32_is_too_coarse_for_is_proved_in_float64():
    model = Faint(Shape()).eval()
    found = prove(model, papr_fx.transform(model, toy_proposal(), 0.5, verify=False))
    assert found.tolerance == 1e-9
    assert found.control > 10 * found.permutation


class OnlyFloat32(Faint):
    def tokens(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return super().tokens(x)


def test_a_model_that_does_not_run_in_float64_gets_the_verdict_of_float32():
    with pytest.raises(papr_fx.VerifyError, match="negative control"):
        papr_fx.transform(OnlyFloat32(Shape()), toy_proposal(), 0.5)


def next_sample(tokens: Tensor, keep: Tensor) -> Tensor:
    """Reads the rows of the next image, as flat indices with a wrong offset do."""
    return ops.gather_tokens(tokens.roll(1, 0), keep)


def off_by_one(tokens: Tensor, keep: Tensor) -> Tensor:
    return ops.gather_tokens(tokens, (keep + 1).clamp(max=tokens.shape[1] - 1))


@pytest.mark.parametrize("wrong", [next_sample, off_by_one])
def test_a_wrong_gather_is_caught(wrong, monkeypatch):
    monkeypatch.setattr(prune_tokens, "gather_tokens", wrong)
    with pytest.raises(papr_fx.VerifyError, match="permutation"):
        papr_fx.transform(ToyViT(Shape()), toy_proposal(), 0.5)


def test_a_wrong_grid_is_caught(monkeypatch):
    find_site = prune_tokens.find_site

    def transposed(graph, blocks):
        site = find_site(graph, blocks)
        return replace(site, grid=site.grid[::-1], axes=site.axes[::-1])

    monkeypatch.setattr(prune_tokens, "find_site", transposed)
    with pytest.raises(papr_fx.VerifyError, match="geometry"):
        papr_fx.transform(ToyViT(Shape(image=(8, 18))), toy_proposal(), 0.5)


@pytest.mark.parametrize(("shift", "message"), [(-1, "permutation"), (1, "could not run")])
def test_a_wrong_prefix_is_caught(shift, message, monkeypatch):
    find_site = prune_tokens.find_site

    def shifted(graph, blocks):
        site = find_site(graph, blocks)
        return replace(site, prefix=site.prefix + shift)

    monkeypatch.setattr(prune_tokens, "find_site", shifted)
    with pytest.raises(papr_fx.VerifyError, match=message):
        papr_fx.transform(ToyViT(Shape(prefix=3, pool="cls")), toy_proposal(), 0.5)


class SummaryToken(ToyViT):
    """Its first token is no constant but a summary of the patches."""

    def tokens(self, x: Tensor) -> Tensor:
        patches = self.patches(x)
        return torch.cat([self.first + patches.mean(1, keepdim=True), patches], dim=1) + self.pos


def test_prefix_tokens_that_the_image_moves_are_refused():
    with pytest.raises(
        papr_fx.VerifyError, match="geometry: the first 1 of `add.*` were taken for prefix tokens, but a patch moves them"
    ):
        papr_fx.transform(SummaryToken(Shape()), toy_proposal(), 0.5)


@pytest.mark.parametrize("name", ["convit_tiny", "xcit_nano_12_p16_224"])
def test_positions_that_no_gather_mends_are_refused(name):
    model = timm.create_model(name, depth=2).eval()
    with pytest.raises(papr_fx.NoSiteError, match="positions beyond the embedding"):
        papr_fx.transform(model, toy_proposal(), 0.5, mode="tokens")


def test_token_trunks_are_not_taken_for_hierarchical_ones():
    with pytest.raises(papr_fx.NoSiteError, match="positions beyond the embedding"):
        papr_fx.transform(timm.create_model("convit_tiny", depth=2).eval(), toy_proposal(), 0.5)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto", "samvit_base_patch16_224"])
def test_spatial_trunks_are_refused(name):
    model = timm.create_model(name).eval()
    example = torch.zeros(1, 3, *model.pretrained_cfg["input_size"][1:])
    with pytest.raises(papr_fx.NoSiteError, match="spatial layout"):
        papr_fx.transform(model, toy_proposal(), 0.5, mode="tokens", example_input=example)


def test_half_precision_is_proved_in_float32():
    model = ToyViT(Shape()).half().eval()
    found = prove(model, papr_fx.transform(model, toy_proposal(), 0.5, verify=False))
    assert found.tolerance == 1e-4
    assert found.permutation < 1e-5
    with pytest.raises(papr_fx.VerifyError):
        papr_fx.transform(PicksAToken(Shape()).half(), toy_proposal(), 0.5)


def test_redrawn_parameters_hide_nothing():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64, init_values=1e-6)
    values = redraw(model, torch.Generator().manual_seed(0), torch.float32)
    for name in ("blocks.0.ls1.gamma", "pos_embed", "cls_token", "blocks.0.attn.qkv.bias"):
        assert 0.5 < values[name].std() < 2
    features = F.linear(torch.randn(64, 192), values["blocks.0.mlp.fc1.weight"])
    assert 0.5 < features.std() < 2


class Mixing(nn.Module):
    """A block of an MLP-Mixer: tokens meet in a matrix of their number."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.matrix = nn.Parameter(torch.randn(count, count))
        self.layer = nn.Sequential(nn.Linear(8, 8))

    def forward(self, x):
        return x + self.layer(self.matrix @ self.norm(x))


class Static(Attention):
    """Attention beside weights that do not depend on the image: normalised over all tokens, they cannot be cut."""

    def __init__(self, count: int) -> None:
        super().__init__(8, 2, False)
        self.table = nn.Parameter(torch.randn(1, 2, count, count))

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        weights = self.scores(q, k).softmax(-1) + self.table.softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


def test_what_a_permutation_cannot_see_hidden_keys_do():
    model = ToyViT(Shape(prefix=0))
    model.blocks = nn.ModuleList(Mixing(16) for _ in range(2))
    with pytest.raises(papr_fx.VerifyError, match="hidden keys: no attention over the 16 tokens"):
        papr_fx.transform(enliven(model), toy_proposal(), 0.5)
    model = ToyViT(Shape())
    for block in model.blocks:
        block.attn = Static(17)
    with pytest.raises(papr_fx.VerifyError, match="hidden keys: the kept tokens of `add_6` are off"):
        papr_fx.transform(enliven(model), toy_proposal(), 0.5)
