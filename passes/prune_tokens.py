"""Keeps only the significant tokens, from the first transformer block on.

Before:
    stream = ...                                    # (B, prefix + n, C), embedded and position-coded
    block  = blocks.0(stream)

Becomes:
    stream      = ...
    papr_keep   = ...                               # (B, prefix + k), see splice_proposal
    papr_tokens = gather_tokens(stream, papr_keep)  # (B, prefix + k, C)
    block       = blocks.0(papr_tokens)

Because: attention takes any number of tokens, and everything else in a block treats each token independently. So a block is
defined for any number of tokens, once positions are in their content (PaPr, Sec. 3.3). Linear cost falls with k, the cost of
attention with its square. The gather comes after prefix concatenation, position embedding, patch dropout and pre-norm, which
all see the tokens in their places. Tokens behind the patches (detection tokens, prompts) are kept as those before them are.

Left alone:
    1. No block of the trunk maps a (B, N, C) stream to a stream of the same shape: the trunk keeps a spatial layout.
    2. No axis of the stream can be traced back to a grid of positions of the images.
    3. A second stream runs through the blocks that does not come from the first.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import fx

from ..dataflow.grids import Flattening, flattening_of, image_rank
from ..errors import NoSiteError
from ..ops import TokenRows, count_windows, gather_tokens, kept_patches
from ..tracing.blocks import block_calls
from ..tracing.fakes import TRACED_BATCH
from ..tracing.graphs import descendants, shape_of
from ..tracing.roles import find_all, has_role, tag
from ..tracing.sequence_first import batch_first
from .kinds import Kind
from .splice_proposal import read_sizes


class SeveralTrunksError(NoSiteError):
    """Two parts of the model run on tokens of their own."""


@dataclass(frozen=True)
class TokenSite:
    """The token stream before the first block.

    Attributes:
        stream: The node whose value is (B, prefix + n + suffix, C).
        block: Qualified name of the first block that reads it.
        rows: The grid of the n patches, and the tokens before and behind it.
        flattening: Where the grid became one axis.
    """

    stream: fx.Node
    block: str
    rows: TokenRows
    flattening: Flattening


def find_site(graph: fx.Graph, blocks: Collection[str], suffix: int = 0) -> TokenSite:
    """Finds the token stream.

    Args:
        graph: A traced graph whose nodes carry `shape` and `joins` in `meta`.
        blocks: Qualified names of the trunk's repeated blocks.
        suffix: How many tokens stand behind the patches.

    Raises:
        NoSiteError: No stream is found, with the nearest miss.
    """
    block, stream = _single_stream(graph, blocks)
    count = cast("tuple[int, ...]", shape_of(stream))[1]
    flattening = flattening_of(stream)
    if flattening is None:
        axes = "(h, w) of the images" if image_rank(graph) == 2 else "(t, h, w) of the clips"
        raise NoSiteError(
            f"no patch tokens: `{stream.name}` has {count} tokens before `{block}`, but no operation upstream flattens a grid "
            f"of positions {axes} into them (a grid of one row or column does not count)"
        )
    patches = TokenRows(flattening.join.grid)
    return TokenSite(stream, block, TokenRows(patches.grid, count - patches.count - suffix, suffix), flattening)


def check_one_trunk(graph: fx.Graph, blocks: Collection[str], others: Iterable[Collection[str]]) -> None:
    """Refuses a model in which other blocks run on tokens that neither come from those of the trunk nor lead to them.

    Args:
        graph: A traced graph that calls all of them.
        blocks: Qualified names of the trunk's blocks.
        others: Qualified names of other repeated blocks, a family each.

    Raises:
        SeveralTrunksError: There are such blocks.
    """
    block, stream = _single_stream(graph, blocks)
    later = {stream, *descendants(stream)}
    for names in others:
        calls = [(name, nodes) for name, nodes in block_calls(graph, names) if _stream(nodes) is not None]
        if not calls:
            continue
        name, nodes = calls[0]
        if _stream(nodes) not in later and stream not in descendants(nodes[0]):
            raise _several(block, name)


def runtime_grid(graph: fx.Graph, site: TokenSite, before: fx.Node, layout: str) -> tuple[fx.Node, ...]:
    """Inserts nodes before `before` that read the grid, for models that take several image sizes.

    It is read where it is flattened. If that is inside a module, sizes of the images are divided by those of a patch.

    Args:
        graph: The graph.
        site: The token stream.
        before: The node before which the sizes are needed.
        layout: Axes of the images.
    """
    with graph.inserting_before(before):
        return _read_flattened(graph, site) if grid_is_readable(site) else _read_images(graph, site, layout)


def grid_is_readable(site: TokenSite) -> bool:
    """Whether the sizes of the grid can be read where it is flattened: in a value of the graph with these axes."""
    flatten, join = site.flattening
    known = cast("tuple[int, ...]", shape_of(flatten.all_input_nodes[0]))
    if join.axes[0] == 0:  # frames are in the batch axis
        known = (known[0] // TRACED_BATCH, *known[1:])
    windows = join.windows or ((-1, 1),) * len(join.grid)  # one window per position
    pairs = zip(join.axes, windows, strict=True)
    return tuple(count_windows(known[axis], *window) if axis < len(known) else 0 for axis, window in pairs) == join.grid


def patch_sizes(images: Sequence[int], rows: TokenRows, layout: str) -> tuple[int, ...] | None:
    """The sizes of a patch, if patches of one size cover images of a shape; otherwise None."""
    sides = [images[layout.index(letter)] for letter in "THW" if letter in layout]
    whole = all(side % count == 0 for side, count in zip(sides, rows.grid, strict=True))
    return tuple(side // count for side, count in zip(sides, rows.grid, strict=True)) if whole else None


def _read_flattened(graph: fx.Graph, site: TokenSite) -> tuple[fx.Node, ...]:
    flatten, join = site.flattening
    sizes = list(read_sizes(graph, flatten.all_input_nodes[0], join.axes))
    if join.axes[0] == 0:
        (images,) = graph.find_nodes(op="placeholder")
        batch = graph.create_node("call_method", "size", (images, 0), name="papr_batch")
        sizes[0] = graph.create_node("call_function", operator.floordiv, (sizes[0], batch), name="papr_frames_each")
    if not join.windows:
        return tuple(sizes)
    return tuple(
        graph.create_node("call_function", count_windows, (size, *window), name=f"{size.name}_unfolded")
        for size, window in zip(sizes, join.windows, strict=True)
    )


def _read_images(graph: fx.Graph, site: TokenSite, layout: str) -> tuple[fx.Node, ...]:
    (images,) = graph.find_nodes(op="placeholder")
    axes = tuple(layout.index(letter) for letter in "THW" if letter in layout)
    patch = cast("tuple[int, ...]", patch_sizes(cast("tuple[int, ...]", shape_of(images)), site.rows, layout))
    sizes = read_sizes(graph, images, axes, "_of_images")
    return tuple(
        graph.create_node("call_function", operator.floordiv, (size, pixels), name=size.name.removesuffix("_of_images"))
        for size, pixels in zip(sizes, patch, strict=True)
    )


def rewrite(graph: fx.Graph, site: TokenSite, keep: fx.Node, joined: fx.Node | None = None) -> None:
    """Gathers the kept tokens and hands them to every later user of the stream.

    With a coarse background they are gathered from `joined`, see `coarsen_background`.
    """
    tokens = joined or site.stream
    with graph.inserting_after(max(keep, tokens)):
        tokens = graph.create_node("call_function", gather_tokens, (tokens, keep), name="papr_tokens")

    def reads_later(user: fx.Node) -> bool:
        return user not in (tokens, joined) and not has_role(user, Kind.DENSE_COUNT)

    site.stream.replace_all_uses_with(tokens, delete_user_cb=reads_later)


def patches_of(graph: fx.Graph, rows: TokenRows, keep: fx.Node) -> fx.Node:
    """The kept patches (B, k) among the kept tokens, from 0 on: one node, whichever pass asks first."""
    if not rows.others:
        return keep
    if known := find_all(graph, Kind.PATCHES):
        return known[0]
    ends = (rows.prefix, rows.suffix) if rows.suffix else (rows.prefix,)
    with graph.inserting_after(keep):
        return tag(graph.create_node("call_function", kept_patches, (keep, *ends), name="papr_patches"), Kind.PATCHES)


def no_tokens(nearest_miss: str) -> NoSiteError:
    """Says that no block runs on tokens."""
    return NoSiteError(
        f"positions keep a spatial layout in the trunk, so tokens cannot be dropped: sought a block that maps (B, N, C) "
        f"tokens to as many; the nearest miss {nearest_miss}"
    )


def _single_stream(graph: fx.Graph, blocks: Collection[str]) -> tuple[str, fx.Node]:
    """The first block that maps tokens to tokens, and the stream that it reads."""
    calls = block_calls(graph, blocks)
    if not calls:
        raise NoSiteError(f"the traced graph calls none of the repeated blocks ({', '.join(blocks)})")
    streams = [(name, nodes, stream) for name, nodes in calls if (stream := _stream(nodes)) is not None]
    if not streams:
        name, nodes = calls[0]
        inputs = ", ".join(f"{n.name} {shape_of(n)}" for n in _inputs(nodes))
        raise no_tokens(f"`{name}` maps {inputs} to {shape_of(nodes[-1])}")
    block, first, stream = streams[0]
    after = descendants(first[-1])
    for other, _, later in streams[1:]:
        if later not in after:
            if other.rpartition(".")[0] != block.rpartition(".")[0]:
                raise _several(block, other)
            raise NoSiteError(
                f"two token streams: `{other}` reads `{later.name}`, which does not come from the first block "
                f"`{block}`; a trunk that runs twice, or in parallel branches, is not pruned"
            )
    return block, stream


def _several(block: str, other: str) -> SeveralTrunksError:
    """Names two trunks by the largest modules around their first blocks that do not hold the other one."""
    one, two = block.split("."), other.split(".")
    depth = 1 + next(i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    return SeveralTrunksError(
        f"two parts of the model run on tokens of their own: `{'.'.join(one[:depth])}` (before `{block}`) and "
        f"`{'.'.join(two[:depth])}` (before `{other}`). Transform each by itself, and put the results in their places"
    )


def _inputs(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The values that nodes read from outside."""
    return list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in nodes))


def _stream(block: Sequence[fx.Node]) -> fx.Node | None:
    """The tokens (B, N, C) that a block maps to as many. A block may return a tuple that starts with them."""
    shape = block[-1].meta.get("parts", (shape_of(block[-1]),))[0]
    if not shape or len(shape) != 3:
        return None
    alike = (node for node in _inputs(block) if shape_of(node) == shape)
    return next((first for node in alike if (shape_of(first := batch_first(node)) or ())[:1] == (TRACED_BATCH,)), None)
