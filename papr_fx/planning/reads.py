"""Refuses code that reads a size as a Python number where the size changes: the graph would hold the traced one."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable

from torch import Tensor, fx, nn

from ..errors import NoSiteError, TraceError
from ..passes import prune_tokens
from ..tracing.fakes import TRACED_BATCH
from ..tracing.graphs import descendants, fixed_value, propagate, remove_dead_code
from ..tracing.sources import GraphModule
from ..tracing.trace import Traced
from .modes import Refused
from .module import PrunedModule

_EQUALITY = operator.eq, operator.ne
_MANY = 4096  # images
_HINT = "which would be a constant of the graph: compute with tensors or with `x.shape` itself there"


def check_batch_reads(traced: Traced, model: nn.Module, images: Tensor) -> None:
    """Refuses a model whose code reads a number or length that follows the batch size.

    A branch may go the same way for two images and for three. So where a number behind it follows the batch, it must not be
    compared with a constant for equality, and all that is read must be the same for one image and for very many.

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
    name, before = type(model).__name__, {node: fixed_value(node) for node in traced.recorded.nodes}

    def values_at(batch: int) -> dict[fx.Node, object]:
        """The values of all nodes for so many images, where nothing that is read has another one."""
        after = _values_at(batch, traced, model, images, reads)
        for node in reads:
            if after[node] != before[node]:
                raise TraceError(
                    f"the forward of {name} reads {named_read(node)} as a Python number or length ({before[node]} for "
                    f"{TRACED_BATCH} images, {after[node]} for {batch}), {_HINT}"
                )
        return after

    after = values_at(TRACED_BATCH + 1)
    following = {node for node in before if _is_number(node) and after[node] != before[node]}
    risky = {*following}
    for node in before:  # in order: what is computed from such numbers, by way of numbers alone
        if _is_number(node) and not risky.isdisjoint(node.all_input_nodes):
            risky.add(node)
    for node in risky.intersection(reads):
        if node.target in _EQUALITY and len(following.intersection(node.all_input_nodes)) == 1:
            raise TraceError(
                f"the forward of {name} reads {named_read(node)} as a Python number or length: it compares one that follows "
                f"the number of images with a constant, {_HINT}"
            )
    for batch in () if risky.isdisjoint(reads) else (1, _MANY):
        values_at(batch)


def _values_at(batch: int, traced: Traced, model: nn.Module, images: Tensor, reads: Iterable[fx.Node]) -> dict[fx.Node, object]:
    """What code could read of each recorded node for so many images."""
    graph = copy.deepcopy(traced.recorded)
    try:
        propagate(traced.scratch_root(model), graph, images, batch=batch)
    except TraceError as error:
        raise TraceError(
            f"the forward of {type(model).__name__} does not run on {batch} images as it does on {TRACED_BATCH}. It reads "
            f"{', '.join(map(named_read, reads))} as a Python number or length, {_HINT}: {error}"
        ) from error
    return dict(zip(traced.recorded.nodes, map(fixed_value, graph.nodes), strict=True))


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("value"), int | float)


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
            names = ", ".join(map(named_read, reads))
            raise NoSiteError(f"the forward of {gm.plan.name} reads {names} as a Python number or length, {_HINT}") from error
        after = {node.name: fixed_value(node) for node in pruned.nodes}
        for node, value in before.items():
            if after.get(node.name, value) != value:  # a pass may have replaced it
                raise NoSiteError(
                    f"the forward of {gm.plan.name} reads {named_read(node)} as a Python number or length "
                    f"({value} with all tokens, {after[node.name]} pruned), {_HINT}"
                )


def named_read(node: fx.Node) -> str:
    """A node, and where code reads its value."""
    return f"`{node.name}` ({node.meta['read']})"
