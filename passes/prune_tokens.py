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
    3. Another stream runs through the blocks that does not come from the first.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from math import prod

from torch import fx

from ..errors import NoSiteError
from ..ops.positions import count_windows, gather_tokens
from ..tracing.fakes import TRACED_BATCH
from ..tracing.graphs import ancestors, descendants

# Name of the node that counts the tokens of the dense stream, for what numbers them.
DENSE_COUNT = "papr_dense_tokens"
_SIZES = ("papr_frames", "papr_rows", "papr_columns")


class UnusedError(NoSiteError):
    """The blocks do not run: the trunk is another part of the model."""


@dataclass(frozen=True)
class Site:
    """The token stream in front of the first block.

    Attributes:
        stream: The node whose value is (B, prefix + n, C).
        block: Qualified name of the first block that reads it.
        join: The node where the grid became one axis of n tokens.
        grid: Rows and columns on the traced images, h * w = n; on clips (frames, rows, columns).
        axes: Where the grid stands in the tensor that was flattened; 0 for frames that are in the batch axis.
        windows: Offset and step of the windows along these axes where an image was unfolded, else none.
        prefix: Tokens in front of the patches.
    """

    stream: fx.Node
    block: str
    join: fx.Node
    grid: tuple[int, ...]
    axes: tuple[int, ...]
    windows: tuple[tuple[int, int], ...]
    prefix: int


def find_site(graph: fx.Graph, blocks: Collection[str]) -> Site:
    """Finds the token stream.

    Args:
        graph: A traced graph whose nodes carry `shape` and `joins` in `meta`.
        blocks: Qualified names of the trunk's repeated blocks.

    Raises:
        UnusedError: None of the blocks runs.
        NoSiteError: No stream is found, with the nearest miss.
    """
    every = calls(graph, blocks)
    if not every:
        raise UnusedError(f"the traced graph calls none of the repeated blocks ({', '.join(blocks)})")
    streams = [(name, nodes, stream) for name, nodes in every if (stream := _stream(nodes)) is not None]
    if not streams:
        name, nodes = every[0]
        inputs = ", ".join(f"{n.name} {n.meta.get('shape')}" for n in _inputs(nodes))
        raise NoSiteError(
            f"positions keep a spatial layout in the trunk, so tokens cannot be dropped: sought a block that maps (B, N, C) "
            f"tokens to as many; the nearest miss `{name}` maps {inputs} to {nodes[-1].meta.get('shape')}"
        )
    block, first, stream = streams[0]
    behind = descendants(first[-1])
    for other, _, later in streams[1:]:
        if later not in behind:
            raise NoSiteError(
                f"two token streams: `{other}` reads `{later.name}`, which does not come from the first block "
                f"`{block}`; a trunk that runs twice, or in parallel branches, is not pruned"
            )
    tokens = stream.meta["shape"][1]
    rank = len(graph.find_nodes(op="placeholder")[0].meta["shape"]) - 2  # (h, w) of images, (t, h, w) of clips
    for node in ancestors(stream):
        for join in reversed(node.meta.get("joins", [])):
            if len(join.grid) == rank and prod(join.grid) <= tokens:
                return Site(stream, block, node, join.grid, join.axes, join.windows, tokens - prod(join.grid))
    folded = _folded_site(stream, block) if rank == 3 else None
    if folded:
        return folded
    raise NoSiteError(
        f"no patch tokens: `{stream.name}` has {tokens} tokens in front of `{block}`, but no operation before it "
        f"flattens a grid of positions {'(h, w) of the images' if rank == 2 else '(t, h, w) of the clips'} into them (a grid "
        "of one row or column is none)"
    )


def _folded_site(stream: fx.Node, block: str) -> Site | None:
    """The site where frames were embedded as images, (B * t, n, C), and joined to (B, t * n, C) behind that."""
    tokens = stream.meta["shape"][1]
    above = list(ancestors(stream))
    for node in above:
        for join in node.meta.get("joins", []):
            if len(join.grid) != 2 or prod(join.grid) > tokens:
                continue
            for earlier in above[above.index(node) :]:
                for frames, inner in earlier.meta.get("folded", []):
                    if len(inner.grid) == 2 and (frames, prod(inner.grid)) == join.grid:
                        grid, axes = (frames, *inner.grid), (0, *inner.axes)
                        return Site(stream, block, earlier, grid, axes, (), tokens - prod(grid))
    return None


def runtime_grid(graph: fx.Graph, site: Site, before: fx.Node) -> tuple[fx.Node, ...]:
    """The grid as sizes read where it is flattened, for models that take several image sizes; inserted before `before`.

    Raises:
        NoSiteError: The node that flattens it takes no tensor of these axes.
    """
    source = site.join.all_input_nodes[0]
    known = source.meta["shape"]
    if site.axes[0] == 0:  # frames are in the batch axis
        known = (known[0] // TRACED_BATCH, *known[1:])
    windows = site.windows or ((-1, 1),) * len(site.grid)  # one window a position
    if tuple(count_windows(known[axis], *window) for axis, window in zip(site.axes, windows, strict=True)) != site.grid:
        raise NoSiteError(
            f"the model takes several image sizes, but the sizes of its grid {site.grid} cannot be read in front of "
            f"`{site.join.name}`: flatten a tensor such as (B, C, h, w) there, or fix the image size"
        )
    with graph.inserting_before(before):
        shape = graph.create_node("call_function", getattr, (source, "shape"), name="papr_shape")
        sizes = [
            graph.create_node("call_function", operator.getitem, (shape, axis), name=name)
            for axis, name in zip(site.axes, _SIZES[-len(site.axes) :], strict=True)
        ]
        if site.axes[0] == 0:
            (images,) = graph.find_nodes(op="placeholder")
            batch = graph.create_node("call_method", "size", (images, 0), name="papr_batch")
            sizes[0] = graph.create_node("call_function", operator.floordiv, (sizes[0], batch), name="papr_frames_each")
        if not site.windows:
            return tuple(sizes)
        return tuple(
            graph.create_node("call_function", count_windows, (size, *window), name=f"{size.name}_unfolded")
            for size, window in zip(sizes, site.windows, strict=True)
        )


def rewrite(graph: fx.Graph, site: Site, keep: fx.Node) -> None:
    """Gathers the kept tokens behind `keep` and hands them to every later user of the stream."""
    with graph.inserting_after(keep):
        tokens = graph.create_node("call_function", gather_tokens, (site.stream, keep), name="papr_tokens")
    site.stream.replace_all_uses_with(tokens, delete_user_cb=lambda user: user is not tokens and user.name != DENSE_COUNT)


def last_tokens(graph: fx.Graph, stream: fx.Node, blocks: Collection[str]) -> fx.Node:
    """The tokens that the last block returns: the last value of the stream's shape that a block computes."""
    shape = stream.meta["shape"]
    for node in reversed(graph.nodes):
        source = node.all_input_nodes[0] if node.target is operator.getitem else node  # a block may return more beside them
        if node.meta.get("shape") == shape and (source.target in blocks or block_of(source, blocks)):
            return node
    return stream


def block_of(node: fx.Node, blocks: Collection[str]) -> str | None:
    """The block in whose forward a node was recorded."""
    return next((block for block in blocks for name in node.meta["inside"] if f"{name}.".startswith(f"{block}.")), None)


def calls(graph: fx.Graph, blocks: Collection[str]) -> list[tuple[str, list[fx.Node]]]:
    """The calls of blocks in order, each with its nodes: one if the block is whole, many if it was traced through."""
    found: list[tuple[str, list[fx.Node]]] = []
    before = None
    for node in graph.nodes:
        name = block_of(node, blocks)
        if name is None and node.op == "call_module" and any(f"{block}.".startswith(f"{node.target}.") for block in blocks):
            name = str(node.target)  # an unopened module around blocks
        if name is not None and (name != before or node.target == name):
            found.append((name, []))
        if name is not None:
            found[-1][1].append(node)
        before = name
    return found


def _inputs(nodes: list[fx.Node]) -> list[fx.Node]:
    """The values that nodes read from outside."""
    return list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in nodes))


def _stream(block: list[fx.Node]) -> fx.Node | None:
    """The tokens (B, N, C) that a block maps to as many; a block may return more beside them."""
    shape = block[-1].meta.get("parts", (block[-1].meta.get("shape"),))[0]
    tokens = shape if shape and len(shape) == 3 and shape[0] == TRACED_BATCH else None
    return next((node for node in _inputs(block) if tokens and node.meta.get("shape") == tokens), None)
