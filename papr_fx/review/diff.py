"""The unified diff of the dense graph and the rewritten one."""

from __future__ import annotations

import difflib

from torch import fx, nn

from ..errors import ArgumentError
from ..passes.kinds import Kind
from ..planning.inputs import with_output
from ..planning.module import PrunedModule, checked_module
from ..tracing.roles import find_all
from ..tracing.text import graph_text
from ..tracing.trace import trace


def graph_diff(model: nn.Module, gm: fx.GraphModule) -> str:
    """The unified diff from the graph of `model`, traced afresh, to the graph of its rewritten form.

    Args:
        model: The model that was given to `transform`.
        gm: The module that it returned.

    Returns:
        Unified diff text; empty at z=1.

    Raises:
        ArgumentError: `gm` was not transformed, or not from a model such as `model`.
    """
    module = checked_module(gm)
    if type(model).__name__ != module.plan.name:
        raise ArgumentError(f"graph_diff: gm was made of a {module.plan.name}, not of a {type(model).__name__}")
    dense = with_output(model, module.plan.output)
    before = trace(dense, module.example(), lambda _, name: name in module.plan.opened, training=module.training).graph
    return _unified(before, module)


def graph_changes(module: PrunedModule) -> str:
    """The same diff from the dense graph that the module keeps."""
    return _unified(module.plan.mode(module.training).dense, module)


def _unified(before: fx.Graph, module: PrunedModule) -> str:
    shrinking = bool(find_all(module.graph, Kind.REDUCED))
    old = graph_text(before).splitlines(keepends=True)
    new = graph_text(module.graph, shrinking=shrinking).splitlines(keepends=True)
    return "".join(difflib.unified_diff(old, new, "dense", f"papr z={module.plan.z:g}", n=2))
