"""The compiler names the device of every tensor and generator that it makes.

While a model is planned its device is the default one. A tensor that takes the default may so meet one of another device, and
PyTorch refuses a generator of the CPU for a GPU. On a machine without a GPU nothing else shows that.
"""

import ast
from pathlib import Path

import pytest

import papr_fx

ROOMS = ("dataflow", "ops", "passes", "planning", "proof", "proposals", "review", "tracing")
FILES = [path for room in ROOMS for path in (Path(papr_fx.__file__).parent / room).glob("*.py")]
FACTORIES = {
    *("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor", "zeros"),
    "Generator",
}


def without_device(code: str) -> list[str]:
    """Calls of `torch.<factory>` that leave the device to the default, as text."""
    found: list[str] = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr not in FACTORIES:
            continue
        named = any(keyword.arg == "device" for keyword in node.keywords) or (node.func.attr == "Generator" and node.args)
        if ast.unparse(node.func.value) == "torch" and not named:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_tensor_names_its_device(path):
    assert without_device(path.read_text()) == []


def test_calls_without_a_device_are_seen():
    code = "torch.randn(2, generator=g).to(d); torch.Generator(); x.new_zeros(2); torch.zeros(2, device=d); torch.Generator(d)"
    assert sorted(without_device(code)) == ["torch.Generator()", "torch.randn(2, generator=g)"]
