"""Versions below the bounds are refused at import; bounds are stated alike; internals of torch are in one module."""

import ast
import importlib
import importlib.metadata
import re
from pathlib import Path

import pytest

import papr_fx
from papr_fx import requirements
from papr_fx.requirements import OLDEST, check_versions

PACKAGE = Path(papr_fx.__file__).parent
ROOT = PACKAGE.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
FILES = [*PACKAGE.glob("*.py"), *PACKAGE.glob("*/*.py")]
LIBRARIES = ("torch", "torchvision", "timm", "transformers")
GOOD = {"Python": "3.12.1", "torch": "2.14.1+cpu", "timm": "1.0.31"}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"torch": "2.8.0+cu128"}, 'needs torch>=2.9; found torch 2.8.0+cu128; the fix: pip install -U "torch>=2.9"'),
        ({"timm": "1.0.9"}, 'needs timm>=1.0.20; found timm 1.0.9; the fix: pip install -U "timm>=1.0.20"'),
        ({"timm": None}, 'found no timm; the fix: pip install -U "timm>=1.0.20"'),
        ({"torch": "1.13", "timm": "0.9.16"}, 'found torch 1.13, timm 0.9.16; the fix: pip install -U "torch>=2.9" "timm>='),
        (
            {"Python": "3.9.18"},
            "found Python 3.9.18; the fix: make an environment with Python 3.10 or newer",
        ),
        ({"Python": "3.9.18", "torch": "2.8"}, 'or newer, and there pip install -U "torch>=2.9"'),
        ({"torch": "unknown"}, "found torch unknown"),
    ],
)
def test_older_versions_are_refused(found, message):
    with pytest.raises(papr_fx.VersionError, match=re.escape(message)) as caught:
        check_versions(GOOD | found)
    assert isinstance(caught.value, papr_fx.PaprError)
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize(
    "found", [{}, OLDEST, {"torch": "2.9.0a0+145a3a7"}, {"torch": "2.16.0.dev20261101"}, {"torch": "3"}, {"timm": "1.1.0.dev0"}]
)
def test_others_are_not(found):
    check_versions(GOOD | found)


def test_they_are_refused_before_anything_else_is_imported(monkeypatch):
    first = next(node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.ImportFrom))
    assert [alias.name for alias in first.names] == ["requirements"]
    imports = [node for node in ast.walk(ast.parse((PACKAGE / "requirements.py").read_text())) if hasattr(node, "module")]
    assert {node.module for node in imports} == {"__future__", "collections.abc", "errors"}
    monkeypatch.setattr(importlib.metadata, "version", {"torch": "2.8.0", "timm": "1.0.31"}.get)
    with pytest.raises(ImportError, match="torch 2.8.0"):
        importlib.reload(requirements)


def padded(version):
    return (*map(int, version.split(".")), 0, 0)[:3]


def lower_bounds():
    """The bounds in pyproject.toml that hold on the oldest Python, by package."""
    return dict(re.findall(r"[\"']([\w-]+)(?:\[\w+\])?>=([\w.]+)[\"']", PROJECT.split("[project]")[1]))


def test_bounds_are_stated_alike():
    bounds = lower_bounds()
    assert {name: bounds[name] for name in ("torch", "timm")} == {name: OLDEST[name] for name in ("torch", "timm")}
    (python,) = re.findall(r'^requires-python = ">=(.*)"$', PROJECT, flags=re.MULTILINE)
    assert python == OLDEST["Python"] == re.findall(r"Python :: (\d\.\d+)", PROJECT)[0]
    pins = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints-oldest.txt").read_text(), flags=re.MULTILINE))
    tools = {"pre-commit", "pyright", "ruff"}  # they check the code, whichever version it runs on
    assert len(bounds) > 25
    for name in bounds.keys() - tools:
        bound, pin = bounds[name], pins[name]
        assert bound == pin or padded(bound) == padded(pin), (
            f"{name}: pyproject.toml says {bound}, constraints-oldest.txt {pin}"
        )


def internals(tree):
    """What code takes of the libraries that they may not have: private names, and names that it asks for first."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.Call) and node.args and re.match(r"(hasattr|getattr)\([\w.]+, '\w+'", ast.unparse(node)):
            yield f"{ast.unparse(node.args[0])}._asked"


def private(code):
    names = (name.split(".") for name in internals(ast.parse(code)))
    return sorted(".".join(n) for n in names if n[0] in LIBRARIES and any(re.match("_[^_]", part) for part in n))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_internals_are_in_one_module(file):
    found = private(file.read_text())
    assert bool(found) == (file.name == "versions.py"), found


def test_every_form_of_internals_is_seen():
    assert private("import torch._dynamo") == ["torch._dynamo"]
    assert private("from torch.fx.graph import _format_target") == ["torch.fx.graph._format_target"]
    assert private("torch._dynamo.reset()") == ["torch._dynamo", "torch._dynamo.reset"]
    assert private("hasattr(torch.backends, 'x')") == ["torch.backends._asked"]
    assert private("import torch; torch.__version__; self._private; from .x import _y") == []
