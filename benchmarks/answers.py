"""Small models, and what they answer where a single thread asks: by keep ratio, batch and mode."""

import copy
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn

import papr_fx
from papr_fx.planning.module import PrunedModule

RATIOS = (1.0, 0.8, 0.65, 0.5, 0.3)
SIZES = range(1, 7)  # images in a batch
STARTS = (0, 5)  # the first image of a batch
ROUNDING = 1e-5  # relative; answers at two ratios must differ by more
SIDE = 64
MODELS: dict[str, Callable[[], nn.Module]] = {
    "ViT": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=SIDE, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10
    ),
    "ConvNeXt": lambda: timm.create_model("convnext_atto", depths=(1,) * 4, dims=(8, 16, 24, 32), num_classes=10),
    "Swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=SIDE,
        embed_dim=12,
        depths=(1, 2),
        num_heads=(2, 4),
        drop_path_rate=0.0,  # which is random
        num_classes=10,
    ),
}
PROPOSAL = "test_resnet"


class WrongAnswerError(Exception):
    """An answer is not the one that a single thread computed."""


@dataclass(frozen=True)
class Question:
    """What is asked of a model: a batch, in eval or training mode."""

    start: int
    size: int
    training: bool = False


class Known:
    """A model's weights, its images, and its answers by keep ratio and question."""

    def __init__(self, name: str, proposal: nn.Module) -> None:
        self.name, self.proposal = name, proposal
        self.images = torch.randn(max(STARTS) + max(SIZES), 3, SIDE, SIDE)
        model = lively(MODELS[name]()).eval()
        self.weights = model.state_dict()
        gm = self.transformed(model, RATIOS[0], verify=True)
        self.answers = {z: self._answers(gm, z) for z in RATIOS}
        whole = Question(STARTS[0], max(SIZES))
        for z, other in itertools.combinations(RATIOS, 2):
            assert error(self.answers[z][whole], self.answers[other][whole]) > 100 * ROUNDING, f"{name}: {z} and {other}"

    def transformed(self, model: nn.Module, z: float, *, verify: bool) -> PrunedModule:
        """A model, pruned."""
        return papr_fx.transform(model, self.proposal, z, example_input=self.images[:1], verify=verify)

    def answer(self, gm: PrunedModule, question: Question) -> Tensor:
        """What a module answers. In training mode gradients are computed too."""
        images = self.images[question.start : question.start + question.size]
        with torch.set_grad_enabled(question.training):
            out: Tensor = gm(images)
        if question.training:
            out.square().mean().backward()
        return out.detach()

    def check(self, out: Tensor, question: Question, ratios: Iterable[float]) -> bool:
        """Whether an answer is the known one to the bit; else it differs by rounding.

        Raises:
            WrongAnswerError: It differs by more, at each of the ratios.
        """
        wanted = {z: self.answers[z][question] for z in ratios}
        if any(torch.equal(out, answer) for answer in wanted.values()):
            return True
        errors = {z: error(out, answer) for z, answer in wanted.items()}
        if not min(errors.values()) < ROUNDING:
            raise WrongAnswerError(f"{self.name}, {question}: relative error at the keep ratios in force {errors}")
        return False

    def _answers(self, gm: PrunedModule, z: float) -> dict[Question, Tensor]:
        papr_fx.set_keep_ratio(gm, z)
        modules = {False: gm, True: copy.deepcopy(gm).train()}
        asked = [Question(start, size, training) for training in modules for start in STARTS for size in SIZES]
        return {question: self.answer(modules[question.training], question) for question in asked}


def lively(model: nn.Module) -> nn.Module:
    """Redraws every parameter at a scale at which faults show."""
    with torch.no_grad():
        for parameter in model.parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 and parameter.shape[0] > 1 else 1
            parameter.copy_(torch.randn(parameter.shape) * 1.5 / fan**0.5)
    return model


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())
