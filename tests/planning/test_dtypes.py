"""Dtypes and devices: a model is pruned in its own, and the result follows `.to()` as the model does."""

import copy

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import papr_fx
from papr_fx.tracing.numerics import relative_error, tensors_of

from ..models import Shape, ToyViT, enliven, images, toy_proposal
from ..versions import AUTOCAST_ON_META

TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}


class Asking(ToyViT):
    """Asks for the dtype of a weight, and for dtype and device of its tokens."""

    def __init__(self) -> None:
        super().__init__(Shape())

    def tokens(self, x: Tensor) -> Tensor:
        tokens = super().tokens(x.to(self.proj.weight.dtype))
        places = torch.arange(tokens.shape[1], device=tokens.device, dtype=tokens.dtype)
        return (
            tokens + 0.1 * places[:, None] + torch.full((1,), 0.5, dtype=torch.float32, device=tokens.device).to(tokens.dtype)
        )


MODELS = {
    "asking": (Asking, (8, 12)),
    "DINOv2": (lambda: transformers.Dinov2Model(transformers.Dinov2Config(**TOWER)), (64, 64)),
    "DINOv3": (lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**TOWER, intermediate_size=48)), (64, 64)),
    "SigLIP": (
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TOWER, intermediate_size=48)),
        (64, 64),
    ),
    "EVA-02": (lambda: timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=2, num_classes=5), (56, 56)),
    "Swin": (
        lambda: transformers.SwinModel(
            transformers.SwinConfig(image_size=64, embed_dim=16, depths=[1, 1], num_heads=[1, 1], window_size=4)
        ),
        (64, 64),
    ),
}


@pytest.fixture(params=MODELS)
def case(request):
    build, size = MODELS[request.param]
    torch.manual_seed(0)
    return build().eval(), torch.randn(2, 3, *size)


@pytest.mark.one_in(2)
@torch.no_grad()
def test_the_result_follows_to(case):
    model, x = case
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=x[:1], verify=False)
    wide = copy.deepcopy(gm).double()
    assert 0 < relative_error(wide(x.double()), gm(x)) < 1e-4
    for name, module in (("half", copy.deepcopy(gm)), ("whole", copy.deepcopy(gm))):
        papr_fx.set_keep_ratio(module, 0.5 if name == "half" else 1.0)
        outputs = tensors_of(module.bfloat16()(x.bfloat16()))
        assert {t.dtype for t in outputs if t.is_floating_point()} == {torch.bfloat16}
    dense = copy.deepcopy(model).bfloat16()
    assert all(torch.equal(a, b) for a, b in zip(outputs, tensors_of(dense(x.bfloat16())), strict=True))
    there = copy.deepcopy(gm).to("meta")
    if type(model).__name__.startswith("DINOv3") and not AUTOCAST_ON_META:
        return
    assert {t.device.type for t in tensors_of(there(x.to("meta")))} == {"meta"}


@pytest.mark.one_in(2)
@torch.no_grad()
def test_a_model_of_half_precision(case):
    model, x = case
    wide = copy.deepcopy(model)
    model, x = model.bfloat16(), x.bfloat16()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=x[:1])
    assert gm.example().dtype == torch.bfloat16
    assert {t.dtype for t in tensors_of(gm(x)) if t.is_floating_point()} == {torch.bfloat16}
    papr_fx.set_keep_ratio(gm, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(gm(x)), tensors_of(model(x)), strict=True))
    gm.float()  # the model's tensors too: they are shared
    assert 0 < relative_error(gm(x.float()), wide(x.float())) < 0.05


class Scaled(nn.Module):
    """A scale in float32 beside a tower in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.tower = ToyViT(Shape()).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.tower(x) * self.scale.to(x.dtype)


class Bytes(nn.Module):
    """Takes pixels as they are in files."""

    def __init__(self) -> None:
        super().__init__()
        self.model = ToyViT(Shape())

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.float() / 255 * 2 - 1)


@torch.no_grad()
def test_images_have_the_dtype_of_the_example():
    x = images(Shape(), 3).bfloat16()
    gm = papr_fx.transform(Scaled().eval(), toy_proposal(), 0.5, example_input=x[:1])
    assert gm.example().dtype == gm(x).dtype == torch.bfloat16
    pixels = torch.randint(256, (3, 3, 8, 12), dtype=torch.uint8)
    model = Bytes().eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=pixels[:1])
    assert (gm.example().dtype, papr_fx.report(gm).mode) == (torch.uint8, "tokens")
    papr_fx.set_keep_ratio(gm, 1.0)
    assert torch.equal(gm(pixels), model(pixels))
    assert gm.double().example().dtype == torch.uint8


class Casting(nn.Module):
    """Gives images the dtype of its weights, as transformers' ViT does; or turns other dtypes than this around too."""

    def __init__(self, model: nn.Module, *, turns: bool = False) -> None:
        super().__init__()
        self.model = model
        self.turns = turns

    def forward(self, x: Tensor) -> Tensor:
        dtype = next(iter(self.model.parameters())).dtype
        if x.dtype != dtype:
            x = x.to(dtype)
            x = x.flip(-1) if self.turns else x
        return self.model(x)


CASTING = {
    "tokens": (lambda: ToyViT(Shape()), (8, 12)),
    "pixels": (lambda: timm.create_model("convnext_atto", num_classes=3, depths=(1,) * 4, dims=(8,) * 4), (64, 64)),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("mode", CASTING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_images_of_any_dtype_where_the_model_takes_them(mode, dtype):
    build, size = CASTING[mode]
    model = Casting(enliven(build())).eval().to(dtype)
    x = torch.randn(3, 3, *size)
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=x[:1].to(dtype), mode=mode, verify=False)
    whole = copy.deepcopy(gm)
    papr_fx.set_keep_ratio(whole, 1.0)
    for given in (x, x.double(), x.bfloat16(), (9 * x).byte()):
        assert torch.equal(gm(given), gm(given.to(dtype)))
        assert torch.equal(whole(given), model(given))
    gm.half()
    assert gm(x).dtype == torch.float16
    compiled = torch.compile(gm, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), gm(x.half()))


class Scaling(Casting):
    """Takes bytes as pixels from 0 to 1."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float() / 255 if x.dtype == torch.uint8 else x)


@torch.no_grad()
def test_bytes_are_converted_where_the_model_converts_them_alone():
    x = images(Shape(), 3)
    model = Scaling(enliven(ToyViT(Shape()))).eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=x[:1].float(), verify=False)
    assert torch.equal(gm(x.half()), gm(x.half().float()))
    with pytest.raises(RuntimeError, match="type"):
        gm(x.byte())


@torch.no_grad()
def test_queries_convert_images_as_the_model_does():
    x = images(Shape(), 3)
    model = Casting(enliven(ToyViT(Shape()))).eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5, example_input=x[:1].float(), verify=False)
    found, wanted = (papr_fx.keep_masks(gm, given) for given in (x.half(), x.half().float()))
    assert all(torch.equal(found[grid], wanted[grid]) for grid in wanted)


def test_images_of_another_dtype_where_the_model_does_not():
    x = images(Shape(), 3)
    for model in (ToyViT(Shape()), Casting(ToyViT(Shape()), turns=True)):
        gm = papr_fx.transform(model.eval(), toy_proposal(), 0.5, example_input=x[:1].float(), verify=False)
        with pytest.raises(RuntimeError, match="type"):
            gm(x)


class Branching(ToyViT):
    """Takes another path in half precision, so a graph holds for one dtype."""

    def tokens(self, x: Tensor) -> Tensor:
        tokens = super().tokens(x).to(self.proj.weight.dtype)
        return tokens.clamp(-3, 3).relu() if tokens.dtype == torch.bfloat16 else tokens


def test_code_that_branches_on_a_dtype_is_traced_in_its_own():
    model = Branching(Shape()).eval()
    gm = papr_fx.transform(model, toy_proposal(), 0.5)
    assert papr_fx.report(gm).mode == "tokens"
    papr_fx.set_keep_ratio(gm, 1.0)
    x = images(Shape(), 2, dtype=torch.float32)
    assert torch.equal(gm(x), model(x))
