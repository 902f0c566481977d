"""Refuses code that reads a size as a Python number where the size changes: the graph would hold the traced one."""

from __future__ import annotations

import copy

from torch import Tensor, fx, nn

from ..errors import NoSiteError, TraceError
from ..passes import prune_tokens
from ..tracing.fakes import TRACED_BATCH
from ..tracing.graphs import descendants, fixed_value, propagate, remove_dead_code
from ..tracing.sources import GraphModule
from ..tracing.trace import Traced
from .modes import Refused
from .module import PrunedModule

_HINT = "which would be a constant of the graph: compute with tensors or with `x.shape` itself there"


def check_batch_reads(traced: Traced, model: nn.Module, images: Tensor) -> None:
    """Refuses a model whose code reads a number or length that follows the batch size.

    Args:
        traced: A trace of the model.
        model: The model.
        images: The images that it was traced with.

    Raises:
        TraceError: It does; the message names what is read.
    """
    reads = [node for node in traced.recorded.nodes if "read" in node.meta]
    if not reads:
        return
    graph = copy.deepcopy(traced.recorded)
    name, batch = type(model).__name__, TRACED_BATCH + 1
    try:
        propagate(traced.scratch_root(model), graph, images, batch=batch)
    except TraceError as error:
        names = ", ".join(map(_named, reads))
        raise TraceError(
            f"the forward of {name} does not run on {batch} images as it does on {TRACED_BATCH}. It reads {names} as a Python "
            f"number or length, {_HINT}: {error}"
        ) from error
    changed = {node.name: fixed_value(node) for node in graph.nodes}
    for node in reads:
        if changed[node.name] != fixed_value(node):
            raise TraceError(
                f"the forward of {name} reads {_named(node)} as a Python number or length ({fixed_value(node)} for "
                f"{TRACED_BATCH} images, {changed[node.name]} for {batch}), {_HINT}"
            )


def check_token_reads(gm: PrunedModule, blocks: tuple[str, ...], recorded: list[fx.Graph]) -> None:
    """Refuses a model whose code reads a number that pruning changes: the graph would hold the dense one.

    Numbers that narrowing changes may stay: rows are those that the code computes from all of them.
    """
    plan = gm.plan.computing_all_rows()
    for graph, training in zip(recorded, (False, True), strict=True):
        if training and isinstance(gm.plan.train, Refused):
            continue
        stream = prune_tokens.find_site(graph, blocks).stream
        reads = [node for node in descendants(stream) if "read" in node.meta]
        before = {node: fixed_value(node) for node in reads}
        if not reads:
            continue
        try:
            root = gm.for_shapes()
            pruned = GraphModule(root, plan.prune(graph, training)).graph  # with the same names
            names = {node.name for node in reads}
            remove_dead_code(pruned, lambda node, names=names: node.name in names)  # blocks whose tokens nobody reads too
            propagate(root, pruned, gm.example())
        except TraceError as error:
            names = ", ".join(map(_named, reads))
            raise NoSiteError(f"the forward of {gm.plan.name} reads {names} as a Python number or length, {_HINT}") from error
        after = {node.name: fixed_value(node) for node in pruned.nodes}
        for node, value in before.items():
            if after.get(node.name, value) != value:  # a pass may have replaced it
                raise NoSiteError(
                    f"the forward of {gm.plan.name} reads {_named(node)} as a Python number or length "
                    f"({value} with all tokens, {after[node.name]} pruned), {_HINT}"
                )


def _named(node: fx.Node) -> str:
    """A node, and where code reads its value."""
    return f"`{node.name}` ({node.meta['read']})"
