"""A pass is specified by two modules: it turns the graph of the first into the graph of the second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from papr_fx import ops
from papr_fx.tracing.fakes import aliased_copy
from papr_fx.tracing.graphs import remove_dead_code
from papr_fx.tracing.trace import trace

# What `Expected` modules call by these names is one node of their graphs.
OPERATORS = [value for name in ops.__all__ if callable(value := getattr(ops, name)) and not isinstance(value, type)]


class Brightness(nn.Module):
    """A proposal: images (B, C, H, W) to maps (B, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Written(fx.Tracer):
    """Traces an `Expected` module as it is written: operators, layers and the proposal are single nodes."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(OPERATORS))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Brightness) or super().is_leaf_module(m, module_qualified_name)


def graph_of(module: nn.Module, images: Tensor) -> fx.Graph:
    """The graph of a `Before` module, traced as `transform` does, through all modules of modules."""
    return trace(module, images, lambda m, _: any(True for _ in m.children())).graph


def assert_becomes(before: nn.Module, graph: fx.Graph, expected: nn.Module, images: Tensor) -> None:
    """Asserts that `graph`, the rewritten graph of `before`, is that of `expected`, in text and in numbers.

    `expected` gets the parameters of `before`.
    """
    expected.load_state_dict(before.state_dict(), strict=False)
    root = aliased_copy(before)
    root.papr_proposal = Brightness()
    actual, wanted = cleaned(root, graph), cleaned(expected, Written().trace(expected))
    assert text_of(actual.graph) == text_of(wanted.graph)
    assert torch.equal(actual(images), expected(images))


def cleaned(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """The graph over the modules of `root`, without dead code."""
    graph.lint()
    module = fx.GraphModule(root, graph)
    remove_dead_code(module.graph)
    module.recompile()
    return module


def text_of(graph: fx.Graph) -> str:
    """One line per node: what it calls, with its arguments by number. Names do not matter."""
    numbers = {node: f"%{number}" for number, node in enumerate(graph.nodes)}

    def written(value: Any) -> str:
        if isinstance(value, fx.Node):
            return numbers[value]
        if isinstance(value, tuple | list):
            return f"({', '.join(map(written, value))})"
        return repr(value)

    lines: list[str] = []
    for node in graph.nodes:
        target = "" if node.op in ("placeholder", "output") else _name(node.target)
        given = [written(value) for value in node.args if node.op != "placeholder"]
        given += [f"{key}={written(value)}" for key, value in sorted(node.kwargs.items())]
        lines.append(f"{numbers[node]} = {node.op} {target}({', '.join(given)})")
    return "\n".join(lines)


def _name(target: str | Callable[..., Any]) -> str:
    return target if isinstance(target, str) else target.__name__
