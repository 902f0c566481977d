"""Every code block of docs/deployment.md, run as it stands on small models."""

import copy
import re
from pathlib import Path

import pytest
import timm
import torch

import papr_fx
from papr_fx.tracing.numerics import relative_error

from .models import Shape, ToyViT, images, toy_proposal
from .models.hierarchical import FAMILIES
from .processes import run_processes

PAGE = Path(__file__).parent.parent / "docs" / "deployment.md"
MODELS = {
    "ViT": lambda: (ToyViT(Shape(depth=1)), images(Shape(), 3, dtype=torch.float32)),
    "rotary ViT": lambda: (timm.create_model("eva02_tiny_patch14_224", depth=1, img_size=56), torch.randn(3, 3, 56, 56)),
    "ConvNeXt": lambda: (FAMILIES["ConvNeXt"].model().float(), torch.randn(3, 3, 64, 64)),
    "Swin": lambda: (FAMILIES["Swin"].model().float(), torch.randn(3, 3, 64, 64)),
}
# Compilers in C++ take their time: not for every model.
FOR_ALL = ("torch.export and AOTInductor", "ONNX", "OpenVINO", "Half precision", "Saving and loading", "int8 weights")
SLOW = {("torch.export and AOTInductor", model) for model in MODELS} | {
    ("torch.compile", "ViT"),
    *((name, model) for name in ("ONNX", "OpenVINO") for model in MODELS if model != "ViT"),
}


def recipes() -> dict[str, list[str]]:
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    found = {text.splitlines()[0]: re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) for text in sections}
    return {name: blocks for name, blocks in found.items() if blocks}


def cases():
    for name in recipes():
        if name.startswith("Training"):
            continue
        for model in MODELS if name in FOR_ALL else ["ViT"]:
            if (name, model) == ("int8 weights", "rotary ViT"):
                continue  # the page says why
            slow = [pytest.mark.slow] if (name, model) in SLOW else []
            yield pytest.param(name, model, marks=slow, id=f"{name}, {model}")


@pytest.mark.filterwarnings("ignore:Int8Tensor does not implement _stable_hash_for_caching")  # torchao's own
@pytest.mark.parametrize(("name", "kind"), [*cases()])
def test_recipe(name, kind, tmp_path):
    torch.compiler.reset()
    model, batch = MODELS[kind]()
    model.eval()
    proposal = toy_proposal()
    gm = papr_fx.transform(model, proposal, 0.5, example_input=batch[:1])
    expected, dense = gm(batch), model(batch)
    given = {"papr_fx": papr_fx, "torch": torch, "copy": copy, "folder": tmp_path}
    given |= {"model": model, "proposal": proposal, "gm": gm, "images": batch}
    tolerance = {"Half precision": 0.1, "int8 weights": 0.1}.get(name, 1e-4)
    seen = 0
    for block in recipes()[name]:
        exec(compile(block, str(PAGE), "exec"), given)
        if "logits" in given:
            logits = given.pop("logits")
            seen += 1
            assert logits.shape == expected.shape
            assert relative_error(logits.float(), expected) < tolerance
            assert bool((logits != dense).any())
    assert seen
    if name == "torch.compile":
        assert relative_error(given["faster"], gm(batch)) < 1e-4 < relative_error(given["faster"], expected)
    if name != "Saving and loading":
        assert torch.equal(model(batch), dense)  # whatever was done to the result


def run_block(block):
    exec(compile(block, str(PAGE), "exec"), {})


def test_training_on_two_processes(tmp_path):
    (block,) = (blocks[0] for name, blocks in recipes().items() if name.startswith("Training"))
    assert run_processes(run_block, block, folder=tmp_path, count=2) == [0, 0], (tmp_path / "out0.txt").read_text()
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    torch.manual_seed(0)
    before = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, num_classes=10).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in before)
    assert all(not torch.equal(first[name], before[name]) for name in before if "weight" in name)
