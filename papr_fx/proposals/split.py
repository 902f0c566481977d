"""Splits a proposal into two networks, images to features and features to logits, with batch norms folded and checked."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import ProposalError, TraceError, VerifyError
from ..tracing.fakes import TRACED_BATCH, fake_like, faking, scratch_copy
from ..tracing.graphs import cut, descendants
from ..tracing.numerics import exact_float32, relative_error
from ..tracing.sources import GraphModule
from ..tracing.trace import Traced, trace
from .features import cut_classifier, find_cut
from .fold import fold_batch_norms, kernel_size

_TOLERANCE = 1e-3  # relative, of the folded network's output


@dataclass(frozen=True)
class Halves:
    """A network in two parts.

    Attributes:
        trunk: Images to features.
        classifier: Features to logits (B, classes); None if the network has none, or its code cannot be traced.
        channel_axis: The channel axis of the features; None for maps without channels.
    """

    trunk: nn.Module
    classifier: nn.Module | None
    channel_axis: int | None


def split_network(network: nn.Module, source: nn.Module, sample: Tensor, *, verify: bool) -> Halves:
    """Splits a network at its last features. A network whose code cannot be traced serves whole, if it returns a map.

    Args:
        network: A copy in eval mode that owns its weights; it is changed.
        source: The network as the user gave it; it is not changed.
        sample: One image, of which only shape, dtype and device matter.
        verify: Whether to compare the folded network with `source`.

    Raises:
        ProposalError: The network has no spatial features.
        VerifyError: Folding changed its output.
    """
    try:
        traced, pool = _traced(network, sample)
    except TraceError as error:
        return _unsplit(network, sample, error)
    gm = GraphModule(traced.root(network), traced.graph)
    found = find_cut(gm, sample)
    with torch.no_grad():
        fold_batch_norms(gm)
    if verify:
        expected = copy.deepcopy(source).eval()
        if pool:
            _pool_globally(expected, pool)
        _check_fold(gm, expected, sample)
    return Halves(cut(gm, gm.graph, found.features), cut_classifier(gm, found.features), found.channel_axis)


def _traced(network: nn.Module, sample: Tensor) -> tuple[Traced, str]:
    """Traces a network. If its last pooling needs larger images, it is made global, and its name is returned."""
    try:
        return trace(network, sample, _is_opened), ""
    except TraceError as error:
        name = error.module
        if not name or not _pool_globally(network, name):
            raise
        traced = trace(network, sample, _is_opened)
        (pool, *_) = traced.graph.find_nodes(op="call_module", target=name)
        gm = GraphModule(traced.root(network), traced.graph)
        later = {node.name for node in descendants(pool)}
        if any(prod(kernel_size(gm, node) or ()) > 1 for node in gm.graph.nodes if node.name in later):
            raise
        return traced, name


def _pool_globally(network: nn.Module, name: str) -> bool:
    """Replaces an average pooling by a global one; returns False if the module is not an average pooling."""
    kinds: dict[type[nn.Module], Any] = {nn.AvgPool2d: nn.AdaptiveAvgPool2d, nn.AvgPool3d: nn.AdaptiveAvgPool3d}
    kind = kinds.get(type(network.get_submodule(name)))
    if kind is not None:
        network.set_submodule(name, kind(1))
    return kind is not None


def _check_fold(gm: fx.GraphModule, expected: nn.Module, sample: Tensor) -> None:
    """Compares the folded network with a copy of the one given, on one random image."""
    dtype = torch.promote_types(sample.dtype, torch.float32)
    random = torch.Generator("cpu").manual_seed(0)
    images = torch.randn(sample.shape, generator=random, device="cpu").to(sample.device, dtype)
    with torch.no_grad(), exact_float32():
        output = expected.to(dtype)(images)
        error = relative_error(copy.deepcopy(gm).to(dtype)(images), output)
    if not error < _TOLERANCE:
        raise VerifyError(
            f"proposal ({type(expected).__name__}): folding its batch norms and merging its branches changed its output by "
            f"{error:.1e} (relative; below {_TOLERANCE:g} is needed)"
        )


def _unsplit(network: nn.Module, sample: Tensor, error: TraceError) -> Halves:
    """Takes a network that cannot be traced as its own trunk, if it returns maps."""
    mode, fake = fake_like(sample, TRACED_BATCH)
    copied = scratch_copy(network)
    try:
        with faking(mode, copied):
            out: object = copied(fake)
    except Exception as refusal:  # it is user code, and may raise anything
        raise ProposalError(f"proposal ({type(network).__name__}) refused images {tuple(fake.shape)}: {refusal}") from refusal
    ranks = (sample.ndim - 1, sample.ndim)  # without channels, and with them
    if isinstance(out, Tensor) and out.ndim in ranks and out.shape[0] == TRACED_BATCH and min(out.shape[-2:]) > 1:
        return Halves(network, None, None if out.ndim == ranks[0] else 1)
    raise ProposalError(
        f"proposal ({type(network).__name__}) returns no spatial map, and its features cannot be reached: {error}"
    )


def _is_opened(module: nn.Module, name: str) -> bool:
    """Opens everything but torch.nn's own layers: the proposal is frozen, so nothing in it depends on the mode."""
    return not type(module).__module__.startswith("torch.nn.") or isinstance(module, nn.Sequential | nn.ModuleList)
