"""Whether tokens follow from their own patches alone: found by changing others, on random numbers."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from ..errors import first_line
from ..ops.rows import TokenRows
from ..tracing.fakes import MODEL_ERRORS
from ..tracing.graphs import cut, nodes_by_name, shape_of
from ..tracing.numerics import exact_float32, forked_random, holds_indices, redraw, relative_error


class Stream(NamedTuple):
    """Tokens (B, N, C), and what their rows stand for."""

    node: fx.Node
    rows: TokenRows


def mixed_patches(root: nn.Module, stream: Stream, conv: fx.Node, images: Tensor) -> str:
    """Why all patches must be embedded: tokens depend on others' embeddings, in eval or training mode. Empty if none does.

    Half of the patches, drawn at random, get other embeddings, and then the other half.

    Args:
        root: A scratch copy of the modules that the graph calls.
        stream: The tokens.
        conv: The convolution that embeds the patches, (B, C, *grid).
        images: Images of the traced shape.
    """
    random = torch.Generator("cpu").manual_seed(0)
    dtype = images.dtype if images.is_floating_point() else torch.float32
    if images.is_floating_point():
        given = torch.randn(images.shape, generator=random, device="cpu").to(dtype)
    else:
        given = torch.randint(256, images.shape, generator=random, device="cpu").to(images.dtype)
    noise = torch.randn((len(images), *(shape_of(conv) or ())[1:]), generator=random, device="cpu").to(dtype)
    half = torch.randperm(stream.rows.cells, generator=random, device="cpu") % 2 == 0
    part = _Disturbed(root, stream, conv.name)
    if any(buffer.is_meta and holds_indices(buffer) for buffer in part.buffers()):
        return "the embedding was not tried (it holds indices without values, on the meta device)"
    for training in (False, True):
        values = {f"part.{name}": value for name, value in redraw(part.part.train(training), random, dtype).items()}
        for changed in (half, ~half):
            added = torch.where(changed.view(1, 1, *stream.rows.grid), noise, 0)
            try:
                plain, other = _runs(part, values, given, added)
            except torch.OutOfMemoryError:  # says nothing about the model
                raise
            except MODEL_ERRORS as error:
                return f"the embedding was not tried ({first_line(error)})"
            if plain.shape[1] != stream.rows.count:  # patches are dropped at random: refused in training for that
                break
            kept = torch.ones(stream.rows.count, dtype=torch.bool, device="cpu")
            kept[stream.rows.prefix : stream.rows.prefix + stream.rows.cells] = ~changed
            if not relative_error(other[:, kept], plain[:, kept]) <= 4 * torch.finfo(dtype).eps:
                return "other tokens depend on dropped patches in front of the first block"
    return ""


@torch.no_grad()
def _runs(part: nn.Module, values: dict[str, Tensor], images: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens, and those with other embeddings; in training, the same elements drop out of both."""
    results: list[Tensor] = []
    with exact_float32():
        for noise in (torch.zeros_like(added), added):
            with forked_random(images):
                torch.manual_seed(0)
                results.append(functional_call(part, values, (images, noise)))
    return results[0], results[1]


class _Disturbed(nn.Module):
    """The graph as far as the tokens, with a second input that is added to what the convolution gives.

    A graph module by itself writes to stderr where it fails, which is a normal result here.
    """

    def __init__(self, root: nn.Module, stream: Stream, conv: str) -> None:
        super().__init__()
        self.part = part = cut(root, stream.node.graph, stream.node)
        node = nodes_by_name(part.graph)[conv]
        with part.graph.inserting_after(part.graph.find_nodes(op="placeholder")[-1]):
            noise = part.graph.placeholder("papr_noise")
        with part.graph.inserting_after(node):
            total = part.graph.create_node("call_function", operator.add, (node, noise))
        node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
        part.recompile()

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        return type(self.part).forward(self.part, images, noise)
