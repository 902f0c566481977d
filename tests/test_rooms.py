"""The rooms of the package: a file imports from its own room and from those below it, and no two files import each other."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import papr_fx

ROOT = Path(papr_fx.__file__).parent

# From the lowest to the highest. A name is a folder, or a file of the package itself.
ROOMS = [
    *("errors", "ops", "tracing", "dataflow", "proposals", "passes", "planning", "review", "proof"),
    *("queries", "video", "transform", "testing", "peers", "evaluation", "choose", "cli"),
    *("__init__", "__main__"),
]
FOLDERS = [ROOT, *(folder for folder in ROOT.iterdir() if (folder / "__init__.py").exists())]  # passes/ is a link
FILES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for folder in FOLDERS for file in folder.glob("*.py")}


def imported(name: str, tree: ast.AST) -> Iterator[str]:
    """The modules of the package that a module imports, as dotted names below the package."""
    package = name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("papr_fx.") for alias in node.names if alias.name.startswith("papr_fx."))
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
            yield whole if whole in FILES else ".".join(base)


def imports() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for name, file in FILES.items():
        found = {target if target in FILES else f"{target}.__init__" for target in imported(name, ast.parse(file.read_text()))}
        graph[name] = found & FILES.keys() - {name}
    return graph


def room(name: str) -> str:
    return name.split(".")[0]


def test_every_file_is_in_a_room():
    assert {room(name) for name in FILES} == set(ROOMS)
    assert len({room(name) for name in FILES if "." in name}) <= 10


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
    assert "planning.inputs" in found["planning.by_tokens"]
    assert len(found["__init__"]) > 8
