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
    grid    = embed_patches(images, patches, conv)     # (B, C, h, w), zeros where a patch is dropped
    stream  = grid.flatten(2).transpose(1, 2) + table
    tokens  = gather_tokens(stream, keep)

Because: a patch's token follows from its own pixels alone, so the tokens that are dropped need not be computed. The rest of the
graph stays as it is, and the zeros are dropped with their rows. In ViT-B at half of its tokens this is 0.7 % of all work, but
on a GPU a library's convolution of three channels takes ten times as long as its multiplications would.

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
from torch.func import functional_call

from ..errors import first_line
from ..ops import embed_patches, kept_patches, patch_grid
from ..tracing.checkpoints import regions_of
from ..tracing.fakes import MODEL_ERRORS
from ..tracing.graphs import ancestors, cut, descendants, nodes_by_name, shape_of
from ..tracing.numerics import exact_float32, forked_random, redraw, relative_error
from ..tracing.roles import tag
from ..tracing.trace import OpenError
from .kinds import Kind
from .prune_tokens import TokenSite
from .splice_proposal import Sizes, read_sizes

_TOLERANCE = 1e-3


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
    conv = found[0]
    module = cast(nn.Conv2d | nn.Conv3d, root.get_submodule(str(conv.target)))
    reason = _reason(conv, site) or _mixed(root, site, conv, images)
    if reason:
        return Embedding(reason=reason)
    return Embedding(conv.name, cast("tuple[int, ...]", module.kernel_size))


def runtime_grid(graph: fx.Graph, found: Embedding) -> Sizes:
    """Inserts nodes before the convolution that divide the sizes of its images by those of a patch."""
    conv = nodes_by_name(graph)[found.node]
    with graph.inserting_before(conv):
        sizes = read_sizes(graph, _images(conv), tuple(range(2, 2 + len(found.patch))), "_of_images")
        return tuple(
            graph.create_node("call_function", operator.floordiv, (size, pixels), name=size.name.removesuffix("_of_images"))
            for size, pixels in zip(sizes, found.patch, strict=True)
        )


def rewrite(graph: fx.Graph, found: Embedding, site: TokenSite, keep: fx.Node) -> None:
    """Puts the embedding of the kept patches in the convolution's place."""
    conv = nodes_by_name(graph)[found.node]
    with graph.inserting_before(conv):
        patches = keep
        if site.rows.others:
            ends = (site.rows.prefix, site.rows.suffix) if site.rows.suffix else (site.rows.prefix,)
            patches = graph.create_node("call_function", kept_patches, (keep, *ends), name="papr_embedded")
        module = graph.create_node("get_attr", str(conv.target), name="papr_convolution")
        arguments = (_images(conv), patches, module)
        made = graph.create_node("call_function", embed_patches, arguments, name="papr_embedding")
    tag(made, Kind.EMBEDDING).meta |= {key: conv.meta[key] for key in conv.meta.keys() - {"role"}}
    conv.replace_all_uses_with(made)
    graph.erase_node(conv)


def _images(conv: fx.Node) -> fx.Node:
    (images,) = conv.all_input_nodes
    return images


def _is_touching(module: nn.Module) -> bool:
    """Whether a module is a convolution whose windows touch, without padding."""
    if type(module) is not nn.Conv2d and type(module) is not nn.Conv3d:
        return False
    plain = module.groups == 1 and set(module.dilation) == {1} and (module.padding == "valid" or set(module.padding) == {0})
    return plain and module.kernel_size == module.stride


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


def _mixed(root: nn.Module, site: TokenSite, conv: fx.Node, images: Tensor) -> str:
    """Why dropped patches must be embedded: other tokens depend on them. Empty if none does."""
    dtype = images.dtype if images.is_floating_point() else torch.float32
    random = torch.Generator("cpu").manual_seed(0)
    part = _disturbed(root, site, conv.name)
    given = torch.randint(256, images.shape, generator=random, device="cpu").to(images.dtype)
    given = torch.randn(images.shape, generator=random, device="cpu").to(dtype) if images.is_floating_point() else given
    noise = torch.randn((len(images), *(shape_of(conv) or ())[1:]), generator=random, device="cpu").to(dtype)
    dropped = (torch.arange(site.rows.cells, device="cpu") % 2 == 1).view(1, 1, *site.rows.grid)
    kept = torch.ones(site.rows.count, dtype=torch.bool, device="cpu")
    kept[site.rows.prefix : site.rows.prefix + site.rows.cells] = ~dropped.flatten()
    try:
        with torch.no_grad(), exact_float32():
            for training in (False, True):
                values = redraw(part.train(training), torch.Generator("cpu").manual_seed(0), dtype)
                results: list[Tensor] = []
                for added in (torch.zeros_like(noise), torch.where(dropped, noise, 0)):
                    with forked_random(given):
                        torch.manual_seed(0)
                        results.append(functional_call(part, values, (given, added))[:, kept])
                if not relative_error(*results) <= _TOLERANCE:
                    return "other tokens depend on dropped patches in front of the first block"
    except torch.OutOfMemoryError:  # says nothing about the model
        raise
    except MODEL_ERRORS as error:
        return f"the embedding was not tried ({first_line(error)})"
    return ""


def _disturbed(root: nn.Module, site: TokenSite, conv: str) -> fx.GraphModule:
    """The graph as far as the tokens, with a second input that is added to what the convolution gives."""
    part = cut(root, site.stream.graph, site.stream)
    node = nodes_by_name(part.graph)[conv]
    with part.graph.inserting_after(part.graph.find_nodes(op="placeholder")[-1]):
        noise = part.graph.placeholder("papr_noise")
    with part.graph.inserting_after(node):
        total = part.graph.create_node("call_function", operator.add, (node, noise))
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    part.recompile()
    return part
