"""Multiply-accumulates (MACs) of a module, counted by torch's flop counter on fake tensors: half the FLOPs it reports."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from ..versions import flop_formulas
from .fakes import TRACED_BATCH, fake_images, fake_like, faking, scratch_copy
from .graphs import Run
from .results import LikeResults, ReshapedError, Result
from .surroundings import SharedSetting


class _NoModules:
    """Hides modules from the flop counter: its hooks fail where code computes gradients itself."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def _counter() -> FlopCounterMode:
    counter = FlopCounterMode(display=False, custom_mapping=flop_formulas())
    counter.mod_tracker = cast(Any, _NoModules())
    return counter


class _CountNodes(Run):
    """Runs a graph and records the multiply-accumulates of every node; those of equal blocks are counted once."""

    def __init__(self, root: nn.Module, graph: fx.Graph, results: LikeResults) -> None:
        super().__init__(root, graph=graph)
        self._results = results
        self.counts: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = self._results.of(n, self.env, lambda: self._counted(n))
        self.counts[n.name] = result.meta["macs"]
        return result.value

    def _counted(self, node: fx.Node) -> Result:
        with _counter() as counter:
            value = super().run_node(node)
        return Result(value, {"macs": counter.get_total_flops() // 2})


def count_macs_by_node(root: nn.Module, graph: fx.Graph, images: Tensor) -> dict[str, int]:
    """MACs of each node of `graph` over the modules of `root`, for one sample shaped like `images` (B, C, H, W).

    Convolutions and matrix products count. `root` should be a scratch copy, as for `propagate`.
    """
    _detach(root)
    for shares in (True, False):
        results = LikeResults(root, "macs", shares=shares)
        counting = _CountNodes(root, graph, results)
        with suppress(ReshapedError), faking(results.mode, root), _spelled_out():
            counting.run(fake_images(results.mode, images, 1))
            break
    return counting.counts


def count_module_macs(module: nn.Module, images: Tensor) -> int:
    """MACs of one forward pass of any module over one sample shaped like `images` (B, C, H, W)."""
    mode, fake = fake_like(images, TRACED_BATCH)
    copied = scratch_copy(module)
    _detach(copied)
    with faking(mode, copied), _spelled_out(), _counter() as counter:
        copied(fake)
    return counter.get_total_flops() // 2 // TRACED_BATCH


def _without_fastpath() -> Callable[[], None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    return lambda: torch.backends.mha.set_fastpath_enabled(before)


# Makes torch.nn's attention modules run as operations that are counted, instead of one fused kernel that is not.
_spelled_out = SharedSetting(_without_fastpath)


def _detach(root: nn.Module) -> None:
    """Replaces the parameters of a copied module by tensors that share their memory and need no gradients."""
    for module in root.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = None if parameter is None else cast(nn.Parameter, parameter.detach())


def count_macs(gm: fx.GraphModule, images: Tensor) -> int:
    """MACs of one forward pass of a graph module over one sample shaped like `images` (B, C, H, W)."""
    return sum(count_macs_by_node(scratch_copy(gm), gm.graph, images).values())
