"""Models that were traced before, as by `torch.fx.symbolic_trace`: one long forward, in which blocks do not run as modules.

Their modules are still called by their qualified names, and so are their parameters. So it shows in whose forward they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from torch import fx, nn

from .graphs import shape_of


def is_holder(module: nn.Module) -> bool:
    """Whether `module` only holds what a graph calls by name: it has no forward of its own."""
    return type(module) is nn.Module


def name_holders(graph: fx.Graph, root: nn.Module) -> None:
    """Adds to `inside` of nodes the modules in whose forward they were before `root`, or a part of it, was traced.

    A node without a name of its own, such as an addition, belongs to the module of the last name before it, as long as shapes
    stay; then it belongs to what that one and the module of the next name have in common. A parameter from elsewhere in the
    middle of a module, such as a shared table, changes nothing.
    """
    flattened = {name for name, module in root.named_modules() if isinstance(module, fx.GraphModule)}
    run: list[fx.Node] = []
    for node in graph.nodes if flattened else ():
        if node.op == "get_attr" and run and _is_foreign(node, run[0]):
            continue
        if node.op in ("call_module", "get_attr", "output") or _around(node) not in flattened:
            _name(run, _holder(node))
            run = []
        run.append(node)


def _is_foreign(parameter: fx.Node, before: fx.Node) -> bool:
    """Whether the modules that are called before and after a parameter have more in common than it has with them."""
    called = parameter.next
    while called.op not in ("call_module", "output"):
        called = called.next
    holder = _holder(before)
    return len(_common(holder, _holder(called))) > len(_common(holder, _holder(parameter)))


def _name(run: Sequence[fx.Node], following: str) -> None:
    """Names the modules of all nodes but the first, which has a name. `following` is the holder of the next name."""
    before = _holder(run[0]) if run else ""
    shared = ".".join(_common(before, following))
    shape = next((shape for node in run if node.op != "get_attr" and (shape := shape_of(node))), None)
    for number, node in enumerate(run[1:], 1):
        stays = any(shape_of(later) == shape for later in run[number:])
        holder, around = before if stays else shared, _around(node)
        if holder != around and f"{holder}.".startswith(f"{around}." if around else ""):
            node.meta["inside"] = (*node.meta["inside"], holder)


def _around(node: fx.Node) -> str:
    return next(reversed(node.meta["inside"]), "")


def _holder(node: fx.Node) -> str:
    """The module that holds what a node names; empty for the model itself."""
    name = str(node.target) if node.op in ("call_module", "get_attr") else _around(node)
    return name.rpartition(".")[0]


def _common(one: str, other: str) -> list[str]:
    """The names of modules around both."""
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one.split("."), other.split("."), strict=False))]
