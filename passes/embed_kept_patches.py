"""Embeds the kept patches, and no others, where a convolution with touching windows embeds them.

Before:
    grid   = patch_embed.proj(images)                  # (B, C, h, w)
    stream = grid.flatten(2).transpose(1, 2) + table   # (B, n, C)
    keep   = ...                                       # (B, k)
    tokens = gather_tokens(stream, keep)

Becomes:
    keep    = ...
    patches = kept_patches(keep, prefix, suffix)       # (B, k)
    conv    = patch_embed.proj                         # the module
    grid    = embed_patches(images, patches, conv)     # (B, C, h, w), another patch where one is dropped
    stream  = grid.flatten(2).transpose(1, 2) + table
    tokens  = gather_tokens(stream, keep)

With a coarse background, the convolution's copy is replaced as well (see `coarsen_background`):
    grids   = embed_quads(images, patches, conv, halved, quads)  # of `images`, and of `halved`; patches and quads once

Because: a patch's token follows from its own pixels alone, so the tokens that are dropped need not be computed. The rest of the
graph stays as it is, and what stands in their places is dropped with its rows. In ViT-B at half of its tokens this is 0.3 % of
all work, but on an H200 the library's convolution of three channels takes 9 % of the dense model's time (docs/speed.md).

Left alone:
    1. Windows that overlap or leave gaps, padding, groups, and any class but PyTorch's own convolutions.
    2. Something between the convolution and the tokens that mixes patches, such as a batch norm in training: tried on numbers.
    3. Someone else who reads the patches: a decoder, or a list of features.
    4. A convolution that is adapted, or that runs hooks. One that becomes such later embeds all patches.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn

from ..dataflow.patch_probe import Stream, mixed_patches
from ..ops import embed_patches, embed_quads, is_touching, patch_grid
from ..tracing.checkpoints import regions_of
from ..tracing.fakes import TRACED_BATCH
from ..tracing.graphs import ancestors, descendants, nodes_by_name, shape_of
from ..tracing.roles import tag
from ..tracing.trace import OpenError
from .coarsen_background import Coarsened
from .kinds import Kind
from .prune_tokens import TokenSite, patches_of
from .splice_proposal import Sizes, read_sizes


@dataclass(frozen=True)
class Embedding:
    """Where patches are embedded. The node is stored by name, so that it holds for copies of the graph.

    Attributes:
        node: Name of the convolution's node; empty if all patches are embedded.
        patch: Sizes of a patch: frames for clips, rows and columns of pixels.
        reason: Why all patches are embedded; empty if only the kept ones are.
    """

    node: str = ""
    patch: tuple[int, ...] = ()
    reason: str = ""


def find_site(root: nn.Module, site: TokenSite, images: Tensor, opened: Collection[str]) -> Embedding:
    """Finds the convolution that embeds the patches.

    Args:
        root: A scratch copy of the modules that the graph calls.
        site: The token stream of a traced graph. The graph is not changed.
        images: Images of the traced shape.
        opened: Qualified names of the modules that are traced through.

    Raises:
        OpenError: Modules must be traced through first.
    """
    before = ancestors(site.stream)
    found = [node for node in before if _embeds(node, root, site)]
    if not found:
        around = {name for node in before for name in _around(node, root)}
        if around - {*opened}:
            raise OpenError(around, f"`{min(around)}` cannot be traced through")
        return Embedding(reason="no convolution with touching windows makes the patches")
    reasons: list[str] = []
    for conv in found:
        reason = _reason(conv, site) or mixed_patches(root, Stream(site.stream, site.rows), conv, images)
        if not reason:
            module = cast(nn.Conv2d | nn.Conv3d, root.get_submodule(str(conv.target)))
            return Embedding(conv.name, cast("tuple[int, ...]", module.kernel_size))
        reasons.append(reason)
    return Embedding(reason=reasons[0])


def runtime_grid(graph: fx.Graph, found: Embedding) -> Sizes:
    """Inserts nodes before the convolution that divide the sizes of its images by those of a patch."""
    conv = nodes_by_name(graph)[found.node]
    with graph.inserting_before(conv):
        sizes = read_sizes(graph, _images(conv), tuple(range(2, 2 + len(found.patch))), "_of_images")
        return tuple(
            graph.create_node("call_function", operator.floordiv, (size, pixels), name=size.name.removesuffix("_of_images"))
            for size, pixels in zip(sizes, found.patch, strict=True)
        )


def rewrite(graph: fx.Graph, found: Embedding, site: TokenSite, keep: fx.Node, coarsened: Coarsened | None = None) -> None:
    """Puts the embedding of the kept patches in the convolution's place, and in that of its copy for a coarse background."""
    conv = nodes_by_name(graph)[found.node]
    patches = patches_of(graph, site.rows, keep)
    with graph.inserting_before(conv):
        module = graph.create_node("get_attr", str(conv.target), name="papr_convolution")
        arguments = (_images(conv), patches, module)
        if coarsened is None:
            grids = [graph.create_node("call_function", embed_patches, arguments, name="papr_embedding")]
            tag(grids[0], Kind.EMBEDDING)
        else:
            halved = (_images(coarsened.copies[conv]), coarsened.members, *([site.rows.suffix] if site.rows.suffix else []))
            both = graph.create_node("call_function", embed_quads, (*arguments, *halved), name="papr_embedding")
            tag(both, Kind.EMBEDDING)
            grids = [
                graph.create_node("call_function", operator.getitem, (both, number), name=f"papr_{what}")
                for number, what in enumerate(("embedded_patches", "embedded_quads"))
            ]
    for node, made in zip([conv, *([coarsened.copies[conv]] if coarsened else [])], grids, strict=True):
        made.meta |= {key: conv.meta[key] for key in conv.meta.keys() - {"role"}}
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def _images(conv: fx.Node) -> fx.Node:
    (images,) = conv.all_input_nodes
    return images


def _is_touching(module: nn.Module) -> bool:
    return type(module) in (nn.Conv2d, nn.Conv3d) and is_touching(module)


def _embeds(node: fx.Node, root: nn.Module, site: TokenSite) -> bool:
    """Whether a node is such a convolution, and its result has the grid of the patches."""
    if node.op != "call_module" or not _is_touching(root.get_submodule(str(node.target))):
        return False
    module = cast(nn.Conv2d | nn.Conv3d, root.get_submodule(str(node.target)))
    source = shape_of(_images(node)) or ()
    return len(source) == 2 + len(site.rows.grid) and patch_grid(source[2:], module.kernel_size) == site.rows.grid


def _around(node: fx.Node, root: nn.Module) -> set[str]:
    """The module that a node calls, and those in it, that hold a convolution with touching windows."""
    if node.op != "call_module" or isinstance(root.get_submodule(str(node.target)), torch.jit.ScriptModule):
        return set()
    around: set[str] = set()
    for name, module in root.get_submodule(str(node.target)).named_modules(prefix=str(node.target)):
        while _is_touching(module) and len(name) > len(str(node.target)):
            name = name.rpartition(".")[0]
            around.add(name)
    return around


def _reason(conv: fx.Node, site: TokenSite) -> str:
    """Why the convolution must embed all patches, as far as the graph tells; empty if it need not."""
    if (shape_of(conv) or ())[0] != TRACED_BATCH:
        return f"`{conv.target}` embeds other images besides"
    if regions_of(conv):
        return f"`{conv.target}` is checkpointed"
    between = {node: None for node in ancestors(site.stream) if node in descendants(conv)}
    for node in between:
        for user in node.users:
            if node is not site.stream and user not in between and _is_tensor(user):
                return f"`{user.name}` reads `{node.name}` too"
    return ""


def _is_tensor(node: fx.Node) -> bool:
    """Whether a node's value holds more than sizes."""
    return shape_of(node) is not None or "parts" in node.meta or node.op == "output"
