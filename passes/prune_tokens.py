"""Keeps only the significant tokens, from the first transformer block on.

Before:
    stream = ...                                    # (B, prefix + n, C), embedded and position-coded
    block  = blocks.0(stream)

Becomes:
    stream      = ...
    papr_keep   = ...                               # (B, prefix + k), see splice_proposal
    papr_tokens = gather_tokens(stream, papr_keep)  # (B, prefix + k, C)
    block       = blocks.0(papr_tokens)

Because: attention weighs whatever tokens it is given, and all else in a block treats each token alone, so a block is
defined for any number of tokens once positions are in their content (PaPr, Sec. 3.3). Linear cost falls with k, attention
with its square. The gather stands behind prefix concatenation, position embedding, patch dropout and pre-norm, which all
see the tokens in their places.

Left alone:
    1. No block of the trunk takes a (B, N, C) stream and returns its like: the trunk keeps a spatial layout.
    2. No axis of the stream can be traced back to a grid of positions in the images.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from math import prod

from torch import fx

from ..errors import NoSiteError
from ..ops import gather_tokens
from ..trace import ancestors


@dataclass(frozen=True)
class Site:
    """The token stream in front of the first block.

    Attributes:
        stream: The node whose value is (B, prefix + n, C).
        block: The first block that reads it.
        join: The node where the grid became one axis of n tokens.
        grid: Rows and columns on the traced images, h * w = n.
        prefix: Tokens in front of the patches.
    """

    stream: fx.Node
    block: fx.Node
    join: fx.Node
    grid: tuple[int, ...]
    prefix: int


def find_site(graph: fx.Graph, blocks: Collection[str]) -> Site:
    """Finds the token stream.

    Args:
        graph: A traced graph whose nodes carry `shape` and `joins` in `meta`.
        blocks: Qualified names of the trunk's repeated blocks.

    Raises:
        NoSiteError: No stream is found, with the nearest miss.
    """
    entries = [node for node in graph.nodes if node.op == "call_module" and _holds(node.target, blocks)]
    if not entries:
        raise NoSiteError("none of the repeated blocks is called by the traced graph")
    block = entries[0]
    shape = block.meta.get("shape")
    streams = [node for node in block.all_input_nodes if shape and len(shape) == 3 and node.meta.get("shape") == shape]
    if not streams:
        inputs = ", ".join(f"{n.name} {n.meta.get('shape')}" for n in block.all_input_nodes)
        raise NoSiteError(
            f"no token stream: sought a first block that maps (B, N, C) tokens to as many; `{block.target}` maps {inputs} to "
            f"{shape}, so positions keep a spatial layout in the trunk and tokens cannot be dropped"
        )
    stream = streams[0]
    tokens = stream.meta["shape"][1]
    for join in ancestors(stream):
        for grid in reversed(join.meta.get("joins", [])):
            if len(grid) == 2 and prod(grid) <= tokens:
                return Site(stream, block, join, grid, tokens - prod(grid))
    raise NoSiteError(
        f"no patch tokens: `{stream.name}` has {tokens} tokens in front of `{block.target}`, but no operation before it "
        "flattens a grid of positions (h, w) of the images into them"
    )


def runtime_grid(graph: fx.Graph, site: Site, before: fx.Node) -> tuple[fx.Node, ...]:
    """The grid as sizes read where it is flattened, for models that take several image sizes; inserted in front of `before`."""
    sources = ((node, _axes(node, site.grid)) for node in site.join.all_input_nodes)
    source, axes = next((node, axes) for node, axes in sources if axes is not None)
    with graph.inserting_before(before):
        shape = graph.create_node("call_function", getattr, (source, "shape"), name="papr_shape")
        return tuple(
            graph.create_node("call_function", operator.getitem, (shape, axis), name=name)
            for axis, name in zip(axes, ("papr_rows", "papr_columns"), strict=True)
        )


def rewrite(graph: fx.Graph, site: Site, keep: fx.Node) -> None:
    """Gathers the kept tokens behind `keep` and hands them to every later user of the stream."""
    with graph.inserting_after(keep):
        tokens = graph.create_node("call_function", gather_tokens, (site.stream, keep), name="papr_tokens")
    site.stream.replace_all_uses_with(tokens, delete_user_cb=lambda user: user is not tokens)


def _holds(name: object, blocks: Collection[str]) -> bool:
    """Whether `name` is a block, or an unopened module around blocks."""
    return any(block == name or block.startswith(f"{name}.") for block in blocks)


def _axes(node: fx.Node, grid: tuple[int, ...]) -> tuple[int, ...] | None:
    shape = node.meta.get("shape") or ()
    starts = [i for i in range(1, len(shape) - len(grid) + 1) if tuple(shape[i : i + len(grid)]) == grid]
    return tuple(range(starts[-1], starts[-1] + len(grid))) if starts else None
