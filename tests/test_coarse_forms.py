"""A coarse background in clips, other sizes and precisions, in training, with merging, compiled and exported."""

import onnxruntime
import pytest
import timm
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

import papr_fx
from papr_fx.testing import check
from papr_fx.tracing.numerics import relative_error

from .coarse_by_hand import coarse_by_hand
from .models import Shape, ToyViT, enliven, images, toy_proposal
from .models.clips import ClipViT, JointViT, clip_proposal
from .models.positioned import positioned
from .test_coarse import coarse, maps_of
from .test_export import AnySize, assert_equal_at_all_sizes, dynamic_program

ODD = Shape(image=(10, 9), prefix=1)  # 5 x 3 patches
SIZES = ((1, 32, 32), (3, 56, 40), (2, 40, 64))  # odd grids too


@pytest.mark.parametrize(
    ("model", "shape"),
    [(ClipViT((2, 4, 3), 1), (1, 3, 4, 16, 9)), (JointViT(0, at_once=False), (1, 3, 4, 12, 6))],
    ids=["tubelets", "frames as images"],
)
def test_clips_have_cells_in_each_frame(model, shape):
    example = torch.zeros(shape)
    found = check(model.eval(), clip_proposal(), 0.5, example_input=example, background="coarse", verify=False)
    assert found.hidden_keys < 1e-9 < found.corrupted
    gm = papr_fx.transform(model, clip_proposal(), 0.5, example_input=example, background="coarse", verify=False)
    places = papr_fx.token_map(gm, torch.randn(2, *shape[1:]))
    (site,) = papr_fx.report(gm).sites
    assert places.shape == (2, *site.grid)
    assert places.max() == site.kept - 1
    cells = places[:, 0, :2, :2].flatten(1)  # four tokens or one
    assert set(cells.sort(1).values.diff(dim=1).ne(0).sum(1).tolist()) <= {0, 3}


@torch.no_grad()
def test_one_graph_compiled():
    torch.compiler.reset()
    model = positioned(ODD, "rotary").eval()
    gm = coarse(model)
    counted = []

    def backend(graph, inputs):
        counted.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(gm, backend=backend, fullgraph=True)
    for batch in (2, 3, 5):
        x = images(ODD, batch, dtype=torch.float32)
        assert relative_error(compiled(x), gm(x)) < 1e-5
    assert len(counted) <= 2  # for two images, and for any number


@pytest.mark.slow
@torch.no_grad()
def test_torch_export_and_onnx(tmp_path):
    gm = coarse(enliven(AnySize()).eval(), 0.4, example_input=torch.zeros(1, 3, 16, 16))
    program = dynamic_program(gm)
    assert_equal_at_all_sizes(gm, program.module(), SIZES)
    path = str(tmp_path / "coarse.onnx")
    torch.onnx.export(program, dynamo=True, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path)
    (given,) = session.get_inputs()
    run = lambda x: torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])  # noqa: E731
    assert_equal_at_all_sizes(gm, run, SIZES)


@torch.no_grad()
def test_images_of_another_size():
    model = enliven(
        timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64, dynamic_img_size=True, num_classes=5)
    ).eval()
    gm, x = coarse(model), torch.randn(2, 3, 48, 80)
    expected = coarse(model, example_input=x[:1])
    assert papr_fx.token_map(gm, x).shape == (2, 3, 5)
    assert torch.equal(papr_fx.token_map(gm, x), papr_fx.token_map(expected, x))
    assert relative_error(gm(x), expected(x)) < 1e-5


class Resizing(ToyViT):
    """Makes images of one size of all, so that a patch has another size in each."""

    def tokens(self, x):
        return super().tokens(nn.functional.interpolate(x, self.shape.image, mode="nearest"))


@torch.no_grad()
def test_patches_of_another_size_are_refused():
    gm = coarse(Resizing(ODD).eval(), example_input=torch.zeros(1, 3, 10, 9))
    assert gm(torch.randn(1, 3, 10, 9)).shape == (1, 7)
    with pytest.raises(papr_fx.ArgumentError, match="was transformed for images of 10 x 9"):
        gm(torch.randn(1, 3, 20, 18))


@torch.no_grad()
def test_half_precision():
    model = positioned(ODD, "rotary").eval()
    x = images(ODD, 2, dtype=torch.float32)
    gm = coarse(model, verify=True)
    expected = gm(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(gm(x).float(), expected) < 0.1
    half = coarse(positioned(ODD, "rotary").bfloat16().eval(), verify=True)  # proved in float32
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_gradients_are_those_of_a_transcription_by_hand():
    model, x = positioned(ODD, "bias").double(), images(ODD, 2)
    for block in model.blocks:
        block.mlp[2].p = 0.0  # dropout
    gm = coarse(model).train()
    gm(x).square().sum().backward()
    found = {name: parameter.grad for name, parameter in gm.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    coarse_by_hand(model, maps_of(gm, x, ODD.grid), x, 0.5).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found.keys() == expected.keys() >= {"proj.weight", "pos", "blocks.0.attn.table"}
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 1e-9


class Dropping(ToyViT):
    """Drops elements of its embedded tokens in training."""

    def __init__(self) -> None:
        super().__init__(ODD)
        self.drop = nn.Dropout(0.3)

    def tokens(self, x):
        return self.drop(super().tokens(x))


def test_dropout_of_the_embedding_is_no_sight_of_other_patches():
    gm = coarse(Dropping().double().eval(), verify=True).train()
    assert gm(images(ODD, 2)).isfinite().all()


class Suffixed(ToyViT):
    """Has tokens behind its patches too, as detectors have."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.last = nn.Parameter(torch.randn(1, 2, 8))

    def tokens(self, x):
        return torch.cat([super().tokens(x), self.last.expand(x.shape[0], -1, -1)], dim=1)


@pytest.mark.parametrize("kind", ["rotary", "none"])
@torch.no_grad()
def test_tokens_behind_the_patches(kind):
    model = Suffixed(ODD)
    if kind == "rotary":
        turning = positioned(ODD, "rotary").blocks
        for block, other in zip(model.blocks, turning, strict=True):
            block.attn = PatchesOnly(other.attn)
    found = check(model, toy_proposal(), 0.5, background="coarse")
    assert found.hidden_keys < 1e-9 < found.corrupted


class PatchesOnly(nn.Module):
    """Turns queries and keys of the patches alone, with two tokens behind them."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary, self.heads = rotary, 2
        self.qkv, self.proj = rotary.qkv, rotary.proj

    def turn(self, x):
        return torch.cat([self.rotary.turn(x[:, :, :-2]), x[:, :, -2:]], dim=2)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(self.turn(q), self.turn(k), v)
        return self.proj(mixed.transpose(1, 2).reshape(b, n, c))


def test_merging_behind_it():
    shape = Shape(image=(12, 18), depth=2)
    gm = papr_fx.transform(ToyViT(shape).eval(), toy_proposal(), 0.6, background="coarse", merge=papr_fx.Merge(2))
    found = papr_fx.report(gm)
    (site,) = found.sites
    assert (site.fine, site.coarse) == (16, 5)
    assert found.reduced == (("blocks.1", 22, 20),)
    assert gm(torch.randn(2, 3, 12, 18)).shape == (2, 7)


@torch.no_grad()
def test_narrowing_behind_it():
    model, x = ToyViT(Shape(image=(10, 9), pool="cls")).double().eval(), images(ODD, 2)
    gm = coarse(model, verify=True)
    assert papr_fx.report(gm).narrowed
    assert relative_error(gm(x), coarse(model, narrow=False)(x)) < 1e-12


class SequenceFirst(ToyViT):
    """Its blocks run on tokens (N, B, C)."""

    def __init__(self) -> None:
        super().__init__(Shape(image=(10, 9), depth=0))
        layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.classify(self.encoder(self.tokens(x).transpose(0, 1)).transpose(0, 1))


def test_tokens_along_the_first_axis():
    found = check(SequenceFirst(), toy_proposal(), 0.5, background="coarse")
    assert found.hidden_keys < 1e-9 < found.corrupted


class CheckpointedEmbedding(ToyViT):
    """Saves the memory of its embedding."""

    def forward(self, x):
        x = checkpoint(self.tokens, x, use_reentrant=False)
        for block in self.blocks:
            x = block(x)
        return self.classify(x)


def test_the_second_embedding_is_in_no_checkpoint():
    model, other, x = CheckpointedEmbedding(ODD).double(), ToyViT(ODD).double(), images(ODD, 2)
    gm, plain = coarse(model).eval(), coarse(other).eval()
    assert relative_error(gm(x), plain(x)) < 1e-12
    for module in (gm, plain):
        module(x).square().sum().backward()
    assert relative_error(model.proj.weight.grad, other.proj.weight.grad) < 1e-12


@pytest.mark.parametrize("restore", ["nearest", "zero"])
@torch.no_grad()
def test_a_dense_head_sees_each_token_over_all_of_its_places(restore):
    features = timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=112, depth=1, out_indices=(0,))
    model, x = enliven(features).eval(), torch.randn(2, 3, 112, 112)
    options = {"background": "coarse", "example_input": x[:1]}
    gm = papr_fx.transform(model, toy_proposal(), 0.3, restore=restore, **options)
    (found,), places = gm(x), papr_fx.token_map(gm, x)
    kept = papr_fx.report(gm).sites[0].kept
    assert found.shape == (2, 192, 7, 7)
    for sample in range(2):
        for token in range(1, kept):
            stands = found[sample][:, places[sample] == token]
            assert stands.shape[1] in (1, 2, 4)
            assert torch.equal(stands, stands[:, :1].expand_as(stands))
        assert not found[sample][:, places[sample] < 0].any() or restore == "nearest"
    headless = timm.create_model("vit_tiny_patch16_224", img_size=112, depth=1, num_classes=0, global_pool="").eval()
    headless = papr_fx.transform(headless, toy_proposal(), 0.3, verify=False, **options)
    tokens = headless(x)
    grid = papr_fx.restore_grid(headless, tokens, x, fill=restore)
    places = papr_fx.token_map(headless, x)
    spread = tokens.gather(1, places.clamp(min=0).flatten(1).unsqueeze(-1).expand(-1, -1, 192)).transpose(1, 2)
    covered = (places >= 0).unsqueeze(1).expand_as(grid)
    assert torch.equal(grid[covered], spread.view_as(grid)[covered])
