"""The rooms of the package: a file imports from its own room and from those below it, and no two files import each other."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import papr_fx

ROOT = Path(papr_fx.__file__).parent

# From the lowest to the highest. A name is a folder, or a file of the package itself.
ROOMS = [
    *("errors", "requirements", "versions", "ops", "tracing", "dataflow", "proposals", "passes", "planning", "review", "proof"),
    *("queries", "video_file", "video", "transform", "testing", "peers", "evaluation", "choose", "cli"),
    *("__init__", "__main__"),
]
FOLDERS = [ROOT, *(folder for folder in ROOT.iterdir() if (folder / "__init__.py").exists())]  # passes/ is a link
FILES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for folder in FOLDERS for file in folder.glob("*.py")}


def imported(name: str, tree: ast.AST) -> Iterator[str]:
    """The modules of the package that a module imports, as dotted names below the package."""
    package = name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.partition(".")[0] == "papr_fx"]
            yield from (alias.partition(".")[2] for alias in names)
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module or ""
        if node.level:
            base = [*package[: len(package) + 1 - node.level], *filter(None, module.split("."))]
        elif module.partition(".")[0] == "papr_fx":
            base = module.split(".")[1:]
        else:
            continue
        for alias in node.names:
            whole = ".".join([*base, alias.name])
            yield whole if whole in FILES or f"{whole}.__init__" in FILES else ".".join(base)


def targets(name: str, code: str) -> set[str]:
    """The files that a module with this code imports."""
    found = {target if target in FILES else f"{target}.__init__".lstrip(".") for target in imported(name, ast.parse(code))}
    assert found <= FILES.keys(), found - FILES.keys()
    return found


@cache
def imports() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for name, file in FILES.items():
        graph[name] = targets(name, file.read_text()) - {name}
    return graph


def room(name: str) -> str:
    return name.split(".")[0]


def test_every_file_is_in_a_room():
    assert {room(name) for name in FILES} == set(ROOMS)
    assert len({room(name) for name in FILES if "." in name} - {"passes"}) <= 9  # passes/ lies at the top of the repository


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_import_leads_up(name):
    up = [target for target in imports()[name] if ROOMS.index(room(target)) > ROOMS.index(room(name))]
    assert not up, f"{name} imports {', '.join(up)}"


def test_no_circle():
    order = list(TopologicalSorter(imports()).static_order())  # raises CycleError
    assert order.index("ops.positions") < order.index("passes.prune_tokens") < order.index("transform")


def test_the_imports_are_found():
    found = imports()
    assert "tracing.graphs" in found["passes.prune_pixels"]
    assert "passes.splice_proposal" in found["passes.prune_pixels"]
    assert "planning.inputs" in found["planning.token_planner"]
    assert len(found["__init__"]) > 8


@pytest.mark.parametrize(
    ("code", "target"),
    [
        ("from .. import Merge", "__init__"),
        ("from papr_fx import Merge", "__init__"),
        ("import papr_fx", "__init__"),
        ("import papr_fx.transform", "transform"),
        ("from papr_fx.planning import plan", "planning.plan"),
        ("from ..planning.plan import Plan", "planning.plan"),
        ("from .. import planning", "planning.__init__"),
        ("if TYPE_CHECKING:\n    from ..proof.case import Case", "proof.case"),
    ],
)
def test_every_form_of_import_is_seen(code, target):
    assert targets("ops.positions", code) == {target}
