"""Gives dropped patches back as coarse tokens: one for each quad, a cell of 2 x 2 patches. Ours, beyond the paper.

Before:
    stream      = embed(images)                              # (B, N, C): prefix tokens and n patches, position-coded
    papr_keep   = choose_quads(papr_psm, z, prefix)          # (B, K): the rows of fine patches, and N + q for coarse quad q
    block       = blocks.0(stream)

Becomes:
    stream      = embed(images)
    papr_quads  = quad_members(grid, papr_keep)              # (c, 4): the patches of each quad
    papr_halved = halve_quads(images, grid, patch)           # (B, C, H, W): every patch holds its quad at half size
    papr_coarse = embed(papr_halved)                         # (B, N, C): the model's own embedding, a second time
    papr_joined = join_quads(stream, papr_coarse, papr_quads, prefix)  # (B, N + c, C)
    block       = blocks.0(stream)                           # `prune_tokens` gathers from `papr_joined`

Because: an embedding that treats each patch independently makes of a patch at half size what it makes of any patch, and adds
the position of each of the four places. So the mean of the four tokens is that of the content with the mean of the positions,
whatever kind of positions the model adds. Fine tokens are those of `stream`, to the bit. It costs a second embedding, 0.7 % of
ViT-B; where one convolution makes the patches, `embed_kept_patches` leaves out of both what is not kept.

Left alone:
    1. Images that patches of one size do not cover, and an embedding in which patches see their neighbours (see
       `papr_fx.planning.patches`), such as a convolutional stem.
    2. Code that changes its images in place: they could not be embedded a second time.
    3. A table of whole numbers or of yes and no that meets the tokens: their mean is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

from torch import fx

from ..dataflow.repairs import Repairs
from ..errors import NoSiteError
from ..ops import halve_quads, join_quads, quad_members
from ..tracing.graphs import ancestors, called, nodes_by_name, shape_of
from ..tracing.results import is_in_place
from ..tracing.roles import tag
from .kinds import Kind
from .prune_tokens import TokenSite, patch_sizes
from .splice_proposal import Sizes

# Calls that read no content of a tensor.
_QUESTIONS = ("getattr", "size", "dim", "numel")
# What a copy of a node does not inherit: its regions of checkpoints, which are runs of nodes, and its role.
_OWN = ("checkpoints", "role")


@dataclass(frozen=True)
class EmbeddingSite:
    """The part of a graph that makes tokens of images.

    Attributes:
        images: Their placeholder.
        nodes: The nodes between the images and the token stream that read content of the images, in order; the stream is the
            last.
        patch: Rows and columns of pixels in a patch.
    """

    images: fx.Node
    nodes: tuple[fx.Node, ...]
    patch: tuple[int, ...]


class Coarsened(NamedTuple):
    """What `rewrite` put in.

    Attributes:
        members: The patches of each quad.
        tokens: All tokens, and behind them one for each quad.
        copies: The nodes of the second embedding, by the nodes that they are copies of.
    """

    members: fx.Node
    tokens: fx.Node
    copies: Mapping[fx.Node, fx.Node]


def find_site(site: TokenSite, layout: str) -> EmbeddingSite:
    """Finds the embedding of a token stream.

    Args:
        site: The token stream of a traced graph.
        layout: Axes of the images.

    Raises:
        NoSiteError: It cannot run a second time, or patches of one size do not cover the images.
    """
    (images,) = site.stream.graph.find_nodes(op="placeholder")
    shape = cast("tuple[int, ...]", shape_of(images))
    patch = patch_sizes(shape, site.rows, layout)
    if patch is None:
        raise NoSiteError(
            f"background='coarse': sought images that patches of one size cover, found images {shape} and a grid of "
            f"{site.rows.grid} patches at `{site.stream.name}`. Use background='drop', or an image size that is a multiple of "
            "the patch's"
        )
    nodes = _content(images, site.stream)
    changing = next((node for node in nodes if is_in_place(node) and images in node.all_input_nodes), None)
    if changing is not None:
        raise NoSiteError(
            f"background='coarse': `{changing.name}` changes the images in place, so they cannot be embedded a second time. "
            f"Write `x = x.{str(changing.target).rstrip('_')}(...)`, or use background='drop'"
        )
    return EmbeddingSite(images, tuple(nodes), patch[-2:])


def check_tables(graph: fx.Graph, repairs: Repairs) -> None:
    """Refuses tables that have no mean.

    Raises:
        NoSiteError: One holds whole numbers, or yes and no.
    """
    nodes = nodes_by_name(graph)
    for table in repairs.tables:
        dtype = nodes[table.value].meta.get("dtype")
        if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
            raise NoSiteError(
                f"background='coarse': a coarse token takes the mean of what its positions have, and `{table.value}` "
                f"{shape_of(nodes[table.value])} holds {dtype}, which has none. Use background='drop'"
            )


def rewrite(
    graph: fx.Graph, found: EmbeddingSite, site: TokenSite, keep: fx.Node, grid: Sizes, conv: fx.Node | None = None
) -> Coarsened:
    """Inserts the second embedding behind `keep`.

    Args:
        graph: The graph.
        found: The embedding.
        site: The token stream.
        keep: The rows of the kept tokens.
        grid: Sizes of the grid, numbers or nodes.
        conv: A node behind `keep` that will be replaced together with its copy: what follows from it comes behind the stream.
    """
    with graph.inserting_before(keep.next):
        members = graph.create_node("call_function", quad_members, (grid, keep), name="papr_quads")
        arguments = (found.images, grid, found.patch)
        last = graph.create_node("call_function", halve_quads, arguments, name="papr_halved")
    copied = {found.images: last}
    for node in found.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: copied.get(n, n))
        with graph.inserting_after(max(last, site.stream) if conv is not None and node > conv else last):
            last = graph.create_node(node.op, node.target, args, kwargs, name=f"papr_coarse_{node.name}")
        copied[node] = last
        last.meta |= {key: value for key, value in node.meta.items() if key not in _OWN}
    with graph.inserting_after(max(last, site.stream)):
        joined = (site.stream, copied[site.stream], members, site.rows.prefix)
        tokens = graph.create_node("call_function", join_quads, joined, name="papr_joined")
    return Coarsened(members, tag(tokens, Kind.JOINED), copied)


def _content(images: fx.Node, stream: fx.Node) -> list[fx.Node]:
    """The nodes from the images to the stream that follow from their content, and not only from their sizes."""
    above, found = ancestors(stream), {images: None}
    for node in _until(stream):
        if found.keys().isdisjoint(node.all_input_nodes) or (node not in above and not is_in_place(node)):
            continue
        asks = "value" in node.meta or (called(node) in _QUESTIONS and shape_of(node) is None)
        if not asks:
            found[node] = None
    return [node for node in found if node is not images]


def _until(stream: fx.Node) -> Iterable[fx.Node]:
    for node in stream.graph.nodes:
        yield node
        if node is stream:
            return
