"""Prints the graph after each pass, for whoever wants to see what a rewrite does step by step."""

from __future__ import annotations

import copy

from torch import fx

from ..errors import TraceError
from ..planning.module import PrunedModule
from ..tracing.graphs import propagate
from ..tracing.text import graph_text


def print_stages(gm: PrunedModule) -> None:
    """Prints the dense graph, the graph after each pass, and the graph that `gm` runs."""

    def show(name: str, graph: fx.Graph) -> None:
        print(f"--- {name}\n{graph_text(_with_shapes(gm, graph))}")

    gm.plan.rewrite(gm.training, show)
    print(f"--- result\n{graph_text(gm.graph)}")


def _with_shapes(gm: PrunedModule, graph: fx.Graph) -> fx.Graph:
    """A copy with the shapes of its own values; without shapes if it only runs after a later pass."""
    stage = copy.deepcopy(graph)
    try:
        propagate(gm.for_shapes(), stage, gm.example())
    except TraceError:
        for node in stage.nodes:
            node.meta.pop("shape", None)
    return stage
