"""Finds a ConvNet's features: the last value that keeps the two spatial axes of images, or the three of clips."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import cast

from torch import Tensor, fx, nn

from ..errors import ProposalError
from ..tracing.fakes import TRACED_BATCH
from ..tracing.graphs import ancestors, cut, descendants, shape_of
from ..tracing.macs import count_macs
from ..tracing.sources import GraphModule
from .fold import kernel_size


@dataclass(frozen=True)
class Cut:
    """Where a traced proposal is cut.

    Attributes:
        features: The node of its features.
        channel_axis: Their channel axis; None for a map without channels.
    """

    features: fx.Node
    channel_axis: int | None


def find_cut(gm: fx.GraphModule, sample: Tensor) -> Cut:
    """Finds the features of a network that was traced with images of the shape of `sample`.

    Raises:
        ProposalError: The network has no features, or has convolutions after them, or works on them as tokens.
    """
    output = gm.graph.output_node().args[0]
    shape = shape_of(output) if isinstance(output, fx.Node) else None
    if not isinstance(output, fx.Node) or shape is None:
        raise ProposalError(
            f"proposal returns a {type(output).__name__}, not one tensor: pass a classifier, or a module that returns its "
            "last feature map (B, K, h, w)"
        )
    rank = sample.ndim - 2
    if len(shape) == rank + 1 and _covers(shape, sample) and (rank == 2 or shape[1] <= sample.shape[2]):
        return Cut(output, None)
    spatial = [n for n in _spatial_nodes(gm.graph, rank) if len(shape_of(n) or ()) == rank + 2]
    last = output if len(shape) == rank + 2 and _covers(shape, sample) else spatial[-1]
    # A convolution to one position is a pooling if its kernel covers the map, as in VGG. Else the images are too small.
    covering = (shape_of(last) or ())[2:]
    too_small = any(
        not _is_spatial(shape_of(user), rank) and kernel_size(gm, user) not in (None, covering) for user in last.users
    )
    if last.op == "placeholder" or too_small:
        raise ProposalError(
            "proposal has no spatial map: sought a value (B, K, h, w) with h * w > 1 computed from images "
            f"{tuple(sample.shape)}, found none. Pass a ConvNet, or give it larger images (proposal_size)"
        )
    _refuse_tokens(gm, last, sample)
    later = [n for n in descendants(last) if n is not last and prod(kernel_size(gm, n) or ()) > 1]
    if any(kernel_size(gm, n) != covering for n in later):
        raise ProposalError(
            f"proposal has convolutions (`{later[0].name}`) after `{last.name}`, the last value that keeps the axes of its "
            "input: pass a module that returns its last feature map"
        )
    return Cut(last, _channel_axis(last, rank))


def cut_classifier(gm: fx.GraphModule, features: fx.Node) -> nn.Module | None:
    """Cuts out the part of a network that maps its features to its output (B, classes).

    Returns:
        None if the network ends at its features, does not return (B, classes), or reads the images after them.
    """
    output = gm.graph.output_node().args[0]
    if not isinstance(output, fx.Node) or output is features or len(output.meta.get("shape", ())) != 2:
        return None
    later, needed = descendants(features), ancestors(output)
    graph = fx.Graph()
    copied = {features: graph.placeholder("features")}
    for node in gm.graph.nodes:
        if node is not features and node in needed and node not in later and node.meta.get("value") == TRACED_BATCH:
            copied[node] = graph.call_method("size", (copied[features], 0))  # the batch size, read from the images
            continue
        if node is features or node not in needed or not (node in later or node.op == "get_attr"):
            continue
        if any(source not in copied for source in node.all_input_nodes):
            return None
        copied[node] = graph.node_copy(node, lambda n: copied[n])
    graph.output(copied[output])
    return GraphModule(gm, graph)


def _covers(shape: tuple[int, ...], sample: Tensor) -> bool:
    """Whether the last two axes have the aspect ratio of the images, and more than one position."""
    rows, columns = shape[-2:]
    height, width = sample.shape[-2:]
    return rows * columns > 1 and abs(rows * width / height - columns) < 1


def _spatial_nodes(graph: fx.Graph, rank: int) -> list[fx.Node]:
    """The values that keep `rank` spatial axes all the way from the images, never flattened on the way."""
    found = {graph.find_nodes(op="placeholder")[0]: True}
    for node in graph.nodes:
        shapes = node.meta.get("parts", (shape_of(node),))
        if any(source in found for source in node.all_input_nodes) and all(_is_spatial(shape, rank) for shape in shapes):
            found[node] = True
    return list(found)


def _is_spatial(shape: tuple[int, ...] | None, rank: int) -> bool:
    if shape is None or len(shape) < rank + 2 or shape[0] != TRACED_BATCH:
        return False
    return max(shape[-2:]) > 1 and max(shape[1 : rank + 1]) > 1  # (B, K, 1, 1) and (B, 1, 1, K) are pooled


def _channel_axis(features: fx.Node, rank: int) -> int:
    """The channel axis: the one that the pooling after the features leaves."""
    shape = cast("tuple[int, ...]", shape_of(features))
    for user in features.users:
        pooled = tuple(size for size in (shape_of(user) or ()) if size != 1)[1:]
        if pooled == shape[rank + 1 :] and pooled != shape[1:2]:
            return rank + 1
    return 1


def _refuse_tokens(gm: fx.GraphModule, features: fx.Node, sample: Tensor) -> None:
    """Refuses a network that does most of its work on the features as tokens: they are its patch embedding, not its result."""
    shape = cast("tuple[int, ...]", shape_of(features))
    reached = {features}
    tokens: list[fx.Node] = []
    for node in gm.graph.nodes:
        if any(source in reached for source in node.all_input_nodes):
            reached.add(node)
            found = shape_of(node) or ()
            if len(found) == 3 and min(found[1:]) > 1:
                tokens.append(node)
    if not tokens:
        return
    share = count_macs(cut(gm, gm.graph, features), sample) / max(1, count_macs(gm, sample))
    if share < 0.5:
        raise ProposalError(
            f"proposal turns its features `{features.name}` {shape} into tokens `{tokens[0].name}` {shape_of(tokens[0])} and "
            f"does {1 - share:.0%} of its work on them: a patch embedding is no significance map. Pass a ConvNet classifier"
        )
