"""Bad input: an error says what was expected, what was found and how to fix it, and the model stays as it was."""

import threading

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import papr_fx

from ..models import Shape, ToyViT, toy_proposal


def transform(z=0.5, model=None, **options):
    return papr_fx.transform(ToyViT(Shape()) if model is None else model, toy_proposal(), z, **options)


@pytest.fixture(scope="module")
def gm():
    """A toy ViT pruned to z=0.5, which no test may change."""
    return transform(verify=False)


@pytest.mark.parametrize("z", [0, -0.5, 1.01, float("nan"), float("inf"), "0.5", None, True, torch.tensor(0.5)])
def test_keep_ratio(z, gm):
    for call in (transform, lambda z: papr_fx.set_keep_ratio(gm, z)):
        with pytest.raises(papr_fx.ArgumentError, match=r"z \(the share of tokens kept\) must"):
            call(z)
    assert papr_fx.report(gm).z == 0.5


@pytest.mark.parametrize("z", [1, np.float32(0.5), np.float64(0.25)])
def test_any_real_number_is_a_keep_ratio(z):
    assert papr_fx.report(transform(z)).z == float(z)


class Hooked(ToyViT):
    def __init__(self) -> None:
        super().__init__(Shape())
        self.register_forward_hook(lambda _m, _i, out: out * 2)


class TwoInputs(ToyViT):
    def __init__(self) -> None:
        super().__init__(Shape())

    def forward(self, x, other):
        return super().forward(x) + other


class Cached(ToyViT):
    def __init__(self) -> None:
        super().__init__(Shape())
        self.lock = threading.Lock()


class Reserved(ToyViT):
    def __init__(self) -> None:
        super().__init__(Shape())
        self.code = nn.Linear(2, 2)


class NoGrad(ToyViT):
    def __init__(self) -> None:
        super().__init__(Shape())

    def forward(self, x):
        with torch.no_grad():
            x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.classify(x)


class Twice(ToyViT):
    def __init__(self) -> None:
        super().__init__(Shape())

    def forward(self, x):
        return super().forward(x) + super().forward(x * 0.5)


class Mixed(ToyViT):
    def __init__(self) -> None:
        super().__init__(Shape())
        self.blocks.eval()

    def forward(self, x):
        return super().forward(F.dropout(x, 0.1, self.training))


def lazy():
    model = ToyViT(Shape())
    model.head = nn.LazyLinear(7)
    return model


def compiled_inside():
    model = ToyViT(Shape())
    model.blocks[1].compile()
    return model


class Sized(ToyViT):
    def forward(self, x):
        if x.shape[-1] != 12:
            raise ValueError(f"images must be 12 wide, not {x.shape[-1]}")
        return super().forward(x)


class Branches(ToyViT):
    def __init__(self) -> None:
        super().__init__(Shape())

    def forward(self, x):
        return super().forward(x) if x.mean() > 0 else super().forward(-x)


class NoSize(ToyViT):
    def __init__(self) -> None:
        super().__init__(Shape())
        del self.image_size


def hooked_inside():
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64)
    model.blocks.register_forward_hook(lambda _m, _i, out: out * 2)
    return model


def replaced_forward():
    model = ToyViT(Shape())
    model.forward = model.tokens
    return model


MODELS = {
    "hooks on the list of blocks": (hooked_inside, papr_fx.ArgumentError, r"model.blocks has forward hooks"),
    "forward replaced": (replaced_forward, papr_fx.ArgumentError, "replaced on the instance"),
    "no module": (lambda: "vit_tiny_patch16_224", papr_fx.ArgumentError, "not str; for a timm name call timm.create_model"),
    "compiled": (lambda: torch.compile(ToyViT(Shape())), papr_fx.ArgumentError, "transform the plain module first"),
    "scripted": (lambda: torch.jit.ScriptModule(), papr_fx.ArgumentError, "ScriptModule"),
    "transformed": (transform, papr_fx.ArgumentError, r"already transformed.*set_keep_ratio"),
    "contains a transformed one": (lambda: nn.Sequential(transform()), papr_fx.ArgumentError, "its submodule `0`"),
    "hooks": (Hooked, papr_fx.ArgumentError, "forward hooks"),
    "several inputs": (TwoInputs, papr_fx.TraceError, "needs more than the images: other"),
    "no size": (NoSize, papr_fx.ArgumentError, "pass example_input="),
    "branches on content": (Branches, papr_fx.TraceError, "a branch depends on the content of the image"),
    "no size in a part": (lambda: timm.create_model("mobileone_s0").stem, papr_fx.ArgumentError, "states no image size"),
    "cannot be copied": (Cached, papr_fx.ArgumentError, "cannot be copied: .*lock"),
    "reserved name": (Reserved, papr_fx.ArgumentError, "members named code"),
    "no gradients inside": (NoGrad, papr_fx.TraceError, "switches gradients or autocast"),
    "a trunk that runs twice": (Twice, papr_fx.NoSiteError, "two token streams"),
    "mixed modes": (Mixed, papr_fx.ArgumentError, "partly in training mode"),
    "data-parallel": (lambda: nn.DataParallel(ToyViT(Shape())), papr_fx.ArgumentError, "transform model.module"),
    "lazy": (lazy, papr_fx.ArgumentError, "lazy parameters"),
    "compiled inside": (compiled_inside, papr_fx.ArgumentError, "transform the plain module first"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(case):
    make, error, message = MODELS[case]
    with pytest.raises(error, match=message):
        transform(model=make())


def test_a_model_compiled_in_place():
    model = ToyViT(Shape())
    model.compile()
    with pytest.raises(papr_fx.ArgumentError, match=r"torch.compile\(gm\)"):
        transform(model=model)


def test_a_model_without_patch_tokens():
    example = torch.zeros(1, 3, 32, 32)
    for model in (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), timm.create_model("resnet18")):
        with pytest.raises(papr_fx.NoSiteError, match="no repeated blocks|spatial layout"):
            transform(model=model, example_input=example)


@pytest.mark.parametrize(
    ("example", "error", "message"),
    [
        ("images", papr_fx.ArgumentError, "must be a tensor"),
        (torch.zeros(3, 8, 12), papr_fx.ArgumentError, r"\(B, C, H, W\).*, not \(3, 8, 12\)"),
        (torch.zeros(0, 3, 8, 12), papr_fx.ArgumentError, r"not \(0, 3, 8, 12\)"),
        (
            torch.zeros(1, 3, 8, 15),
            papr_fx.TraceError,
            r"Sized itself does not run on images \(1, 3, 8, 15\): ValueError: images must be 12 wide, not 15\.",
        ),
        (torch.zeros(1, 4, 8, 12), papr_fx.TraceError, "`proj` refused its input .*channels"),
    ],
)
def test_example_input(example, error, message):
    with pytest.raises(error, match=message):
        transform(model=Sized(Shape()), example_input=example)


def test_an_image_size_that_a_timm_model_refuses():
    with pytest.raises(papr_fx.TraceError, match=r"`patch_embed` refused its input \(2, 3, 80, 80\).*64"):
        transform(
            model=timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64), example_input=torch.zeros(1, 3, 80, 80)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "rows"}, "mode must be one of 'auto', 'tokens', 'pixels', not 'rows'"),
        ({"mode": None}, "mode must be"),
        ({"background": "blur"}, "background must be one of 'auto', 'keep', 'zero', 'drop', 'coarse', not 'blur'"),
        ({"saliency": "mean"}, 'saliency must be one of "psm"'),
        ({"merge": 8}, r"merge must be papr_fx.Merge\(r=8\)"),
        ({"proposal_size": -1}, "proposal_size must be"),
        ({"proposal_size": 0}, "proposal_size must be"),
        ({"proposal_size": True}, "proposal_size must be"),
        ({"proposal_size": (8, 12, 3)}, "proposal_size must be"),
        ({"proposal_size": "160"}, "proposal_size must be"),
        ({"input_stats": "own"}, "input_stats must be"),
        ({"input_stats": ((0.5, 0.5), (0.5, 0.5))}, "input_stats"),
        ({"input_stats": (((0.5,), (0.5,)), ((0.5,), (0.5,)))}, "needs 3 numbers"),
        ({"input_stats": (((0.5,) * 3, (0,) * 3), ((0.5,) * 3, (0.5,) * 3))}, "above 0"),
    ],
)
def test_options(options, message):
    model = ToyViT(Shape())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(papr_fx.ArgumentError, match=message):
        transform(model=model, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_proposal_smaller_than_one_position():
    with pytest.raises(papr_fx.ProposalError, match="proposal_size"):
        papr_fx.transform(ToyViT(Shape()), timm.create_model("resnet18"), 0.5, proposal_size=(32, 32))


@pytest.mark.parametrize(
    "call",
    [
        papr_fx.report,
        lambda m: papr_fx.keep_masks(m, torch.zeros(1, 3, 8, 12)),
        lambda m: papr_fx.set_keep_ratio(m, 0.5),
        lambda m: papr_fx.significance(m, torch.zeros(1, 3, 8, 12)),
        lambda m: papr_fx.graph_diff(m, m),
    ],
)
def test_modules_that_were_not_transformed(call):
    with pytest.raises(papr_fx.ArgumentError, match="sought a module returned by papr_fx.transform"):
        call(ToyViT(Shape()))
    with pytest.raises(papr_fx.ArgumentError, match="the module that was given to torch.compile"):
        call(torch.compile(ToyViT(Shape())))


@pytest.mark.parametrize("images", [None, torch.zeros(3, 8, 12), torch.zeros(1, 4, 8, 12)])
def test_images_of_the_questions(images, gm):
    for ask in (papr_fx.keep_masks, papr_fx.significance):
        with pytest.raises(papr_fx.ArgumentError, match=r"images must be a tensor \(B, 3, H, W\)"):
            ask(gm, images)


def test_models_and_proposals_on_two_devices():
    model, proposal = ToyViT(Shape()), toy_proposal()
    model.head.to("meta")
    with pytest.raises(papr_fx.ArgumentError, match=r"several devices \(cpu, meta\)"):
        transform(model=model)
    proposal[0].to("meta")
    with pytest.raises(papr_fx.ProposalError, match="no weights"):
        papr_fx.transform(ToyViT(Shape()), proposal, 0.5)


def test_every_error_is_a_papr_error_and_a_value_error():
    for error in (papr_fx.ArgumentError, papr_fx.NoSiteError, papr_fx.ProposalError, papr_fx.TraceError, papr_fx.VerifyError):
        assert issubclass(error, papr_fx.PaprError)
        assert issubclass(error, ValueError)
