"""Normalisation statistics: images are normalised again for the proposal."""

import warnings

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

import papr_fx
from papr_fx.proposals import LITE0_STATISTICS, lite0
from papr_fx.proposals.build import ImageSpec, ProposalOptions, build_proposal
from papr_fx.proposals.statistics import Network, renormalisation, statistics_of
from papr_fx.tracing.numerics import relative_error

from ..models import Shape, ToyViT, toy_proposal
from ..versions import MODULES_OF_TRANSFORMERS_5
from .networks import before_pooling, timm_model


def test_renormalises_between_the_two_networks():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64)  # mean and std 0.5
    network = timm_model("resnet18")  # ImageNet's
    pixels = torch.rand(2, 3, 64, 64)
    config = network.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))

    def error(target, input_stats, expected):
        options = ProposalOptions(input_stats=input_stats, verify=False)
        return relative_error(build_proposal(network, target, ImageSpec.of(pixels), options)(own), expected)

    with torch.no_grad():
        own = (pixels - 0.5) / 0.5
        expected = before_pooling(network, "global_pool")((pixels - mean) / std).mean(1)
        assert error(model, "auto", expected) < 1e-4
        given = (((0.5,) * 3, (0.5,) * 3), (config["mean"], config["std"]))
        assert error(nn.Identity(), given, expected) < 1e-4
        assert error(model, "shared", before_pooling(network, "global_pool")(own).mean(1)) < 1e-4


@pytest.mark.parametrize("given", [None, "none", 3])
def test_other_forms_are_refused(given):
    with pytest.raises(papr_fx.ArgumentError, match='input_stats must be "auto", "shared"'):
        papr_fx.transform(ToyViT(Shape()), timm.create_model("resnet10t"), 0.5, input_stats=given)


HALF = ((0.5,) * 3, (0.5,) * 3)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RAW = ((0.0,) * 3, (1.0,) * 3)
BYTES = ((0.0,) * 3, (1 / 255,) * 3)
TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 64, "patch_size": 16}


def vit():
    return timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64).eval()  # mean and std 0.5


class Around(nn.Module):
    """A user's module around a model, which may normalise the images itself."""

    def __init__(self, model: nn.Module, normalise=lambda x: x) -> None:
        super().__init__()
        self.model = model
        self.normalise = normalise

    def forward(self, x):
        return self.model(self.normalise(x))


class OpenClip(nn.Module):
    """Keeps mean and std where open_clip does."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = ToyViT(Shape())
        self.visual.image_mean, self.visual.image_std = IMAGENET


class TwoTeachers(nn.Module):
    """Two models that take other pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = vit(), timm_model("resnet10t")


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: nn.Sequential(vit()), HALF),
        (lambda: nn.Sequential(Around(vit()), nn.Linear(1000, 400)), HALF),
        (lambda: nn.DataParallel(timm_model("resnet10t")), IMAGENET),
        (lambda: torchvision.models.resnet18(), IMAGENET),
        (lambda: nn.Sequential(*list(torchvision.models.resnet18().children())[:-2]), IMAGENET),
        (lambda: torchvision.models.swin_t(num_classes=10), IMAGENET),
        (lambda: torchvision.models.video.r3d_18(), ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))),
        (lambda: transformers.ViTModel(transformers.ViTConfig(**TOWER)), HALF),
        (lambda: Around(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TOWER))), HALF),
        (lambda: OpenClip(), IMAGENET),
        (lite0, LITE0_STATISTICS),
        (lambda: TwoTeachers(), None),
        (lambda: ToyViT(Shape()), None),
    ],
)
def test_what_modules_state(build, expected):
    assert statistics_of(build()) == expected


def test_weights_of_this_size_say_otherwise():
    with torch.device("meta"):
        large = torchvision.models.efficientnet_v2_l()
    assert statistics_of(large) == HALF


@MODULES_OF_TRANSFORMERS_5
def test_processors_of_clip():
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER))
    processor = transformers.CLIPImageProcessor
    assert statistics_of(model) == (tuple(processor.image_mean), tuple(processor.image_std))


@pytest.mark.parametrize(
    ("normalise", "expected"),
    [
        (lambda x: (x - 0.5) / 0.5, RAW),
        (lambda x: (x / 255 - 0.5) / 0.5, BYTES),
        (torchvision.transforms.Normalize((0.5,) * 3, (0.5,) * 3), RAW),
        (nn.Sequential(nn.Upsample(64), torchvision.transforms.Normalize((0.5,) * 3, (0.5,) * 3)), RAW),
        (lambda x: x, HALF),
        (lambda x: x.flip(1), HALF),  # no scale and shift: not taken for a normalisation
    ],
)
@pytest.mark.parametrize("stated", [True, False])
def test_normalisation_inside(normalise, expected, stated):
    model = vit()
    if not stated:
        model.pretrained_cfg = {}
    proposal = Network(timm_model("resnet10t"), torch.zeros(1, 3, 64, 64), 1)
    found = renormalisation(Network(Around(model, normalise), torch.zeros(1, 3, 64, 64), 1), proposal, "auto")
    if not stated and expected == HALF:
        assert found.factors is None
        assert found.unknown == "model"
        return
    pixels = torch.rand(3, dtype=torch.float64)
    (mean, std), (own_mean, own_std) = (torch.tensor(part, dtype=torch.float64) for part in (expected, IMAGENET))
    scale, shift = found.factors
    assert relative_error((pixels - mean) / std * scale + shift, (pixels - own_mean) / own_std) < 1e-4


def test_bytes_that_the_model_converts():
    model = Around(vit(), lambda x: x.float() / 255 * 2 - 1)
    proposal = Network(timm_model("resnet10t"), torch.zeros(1, 3, 64, 64), 1)
    found = renormalisation(Network(model, torch.zeros(1, 3, 64, 64, dtype=torch.uint8), 1), proposal, "auto")
    pixels = torch.tensor([10.0, 100.0, 250.0], dtype=torch.float64)
    own_mean, own_std = (torch.tensor(part, dtype=torch.float64) for part in IMAGENET)
    assert relative_error(pixels * found.factors[0] + found.factors[1], (pixels / 255 - own_mean) / own_std) < 1e-4


def test_unknown_statistics_are_said_once():
    unknown = vit()
    unknown.pretrained_cfg = {}
    network = timm_model("resnet10t")
    with pytest.warns(papr_fx.StatisticsWarning, match="unknown for VisionTransformer") as seen:
        gm = papr_fx.transform(unknown, network, 0.5, verify=False)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert "statistics: unknown for VisionTransformer" in str(papr_fx.report(gm))
    network.pretrained_cfg = {}
    with pytest.warns(papr_fx.StatisticsWarning, match="unknown for ResNet"):
        papr_fx.transform(vit(), network, 0.5, verify=False)


def test_where_nothing_is_said():
    unknown = vit()
    unknown.pretrained_cfg = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        papr_fx.transform(unknown, timm_model("resnet10t"), 0.5, input_stats="shared", verify=False)
        papr_fx.transform(unknown, toy_proposal(), 0.5, verify=False)
        papr_fx.transform(vit(), toy_proposal(), 0.5, verify=False)
        wrapped, example = nn.Sequential(vit()), torch.zeros(1, 3, 64, 64)
        gm = papr_fx.transform(wrapped, timm_model("resnet10t"), 0.5, example_input=example, verify=False)
    assert papr_fx.report(gm).statistics.startswith(
        "model mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5) (pretrained_cfg); proposal"
    )
