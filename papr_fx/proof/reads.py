"""Part 16, reads: behind the last block, fewer tokens are read as all of them are."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..errors import VerifyError
from ..tracing.blocks import last_tokens
from ..tracing.graphs import nodes_by_name, shape_of
from ..tracing.numerics import tensors_of
from ..tracing.sources import GraphModule
from .case import Case


def check(case: Case) -> None:
    """Makes single tokens behind the last block NaN: each output must become NaN, or not, as it does in the dense graph.

    These are all tokens beside the patches, and the first and last kept patch, one at a time. What is computed from NaN is NaN,
    be it a mean or a maximum.

    Fault: a head that takes other tokens of fewer. The other parts do not find it: with all tokens nothing is wrong, any order
    of the kept ones gives the same, and hidden keys end with the last block.
    Example: the mean of `x[:, -16:]`, which is that of 16 patches, and of fewer tokens counts the class token.
    Does nothing for pixel operators.

    Raises:
        VerifyError: An output reads a token in one of the graphs alone.
    """
    if not case.rewrite.prunes_tokens:
        return
    rows, (keep,) = case.rewrite.choices[0].rows, case.indices(case.kept)
    kept = keep.shape[1]
    first, last = range(rows.prefix), range(kept - rows.suffix, kept)
    probed = [*first, rows.prefix, kept - rows.suffix - 1, *last]
    dense, pruned = case.rewrite.dense_graph(), case.rewrite.pruned_graph()
    count, width = (shape_of(_last(case, dense)) or (0, 0, 0))[1:]
    tokens = torch.randn((1, count, width), generator=case.random, device=keep.device, dtype=case.images.dtype)
    places = keep[0, probed].tolist()
    wanted = _reading(case, dense, tokens, places)
    found = _reading(case, pruned, tokens[:, keep[0]], probed, keep)
    for place, before, after in zip(places, wanted, found, strict=True):
        if before != after:
            raise VerifyError(
                f"reads: behind the last block, of {kept} tokens the outputs {after} read token {place}, of all {count} the "
                f"outputs {before}: code there takes other tokens of fewer. Slice by the number of tokens in "
                "front of the patches and behind them"
            )


def _last(case: Case, graph: fx.Graph) -> fx.Node:
    return last_tokens(graph, nodes_by_name(graph)[case.rewrite.choices[0].stream], case.rewrite.blocks)


def _reading(case: Case, graph: fx.Graph, tokens: Tensor, probed: list[int], *keep: Tensor) -> list[list[int]]:
    """For each probed row of the tokens behind the last block, (1, N, C), which outputs read it."""
    last = nodes_by_name(graph)[_last(case, case.dense.graph).name]
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        given = graph.placeholder("last_tokens")
    last.replace_all_uses_with(given)
    behind = GraphModule(case.root, graph)
    behind.graph.eliminate_dead_code()  # the blocks
    behind.recompile()
    rows = tokens.repeat(len(probed), 1, 1)
    for sample, row in enumerate(probed):
        rows[sample, row] = torch.nan
    images = case.images[:1].repeat(len(rows), *[1] * (case.images.ndim - 1))
    outputs = tensors_of(case.run(behind, images, *(index.repeat(len(rows), 1) for index in keep), rows))
    by_sample = [(number, out) for number, out in enumerate(outputs) if out.shape[:1] == (len(rows),)]
    return [[number for number, out in by_sample if bool(out[sample].isnan().any())] for sample in range(len(rows))]
