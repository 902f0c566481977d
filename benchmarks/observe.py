"""Watches inductor while it lowers a graph, and writes what it sees into a `Lowering`."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._inductor.graph import GraphLowering
from torch._inductor.output_code import CompiledFxGraph
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._inductor.scheduler import Scheduler
from torch._inductor.utils import FORBIDDEN_CUDAGRAPH_OPS
from torch._inductor.virtualized import V

from .lowered import Kernel, Lowering, Step


def inspect_graph(graph: fx.Graph, lowering: Lowering) -> None:
    """Finds operations that wait for the device, or whose sizes depend on data, and copies between devices."""
    for node in graph.nodes:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            continue
        tensors = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        unsafe = {torch.Tag.data_dependent_output, torch.Tag.cudagraph_unsafe} & set(target.tags)
        dynamic = torch.Tag.dynamic_output_shape in target.tags
        if target is torch.ops.aten.index.Tensor:  # its result's size depends on data only where a mask chooses
            dynamic = any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
        if str(target) in FORBIDDEN_CUDAGRAPH_OPS or unsafe or dynamic:
            lowering.syncs.append(str(target))
        devices = {t.device.type for t in tensors if t.ndim}
        out = node.meta.get("val")
        if isinstance(out, Tensor) and devices and devices != {out.device.type}:
            lowering.copies.append(f"{target} from {', '.join(sorted(devices))} to {out.device.type}")


def count_kernels(code: str, lowering: Lowering) -> None:
    """Counts launches and library calls in a wrapper's code, and finds calls in it that wait for the device."""
    body = re.sub(r"async_compile\.triton\(.*?'''.*?'''", "", code, flags=re.DOTALL)
    body = body.split("def benchmark_compiled_module")[0].split("def get_args")[0]
    lowering.launches += len(re.findall(r"\btriton_\w+\.run\(", body))
    for call in re.findall(r"(?<![\w.])(?:extern_kernels|(?:torch\.ops\.)?aten)\.(\w+)[\w.]*\(", body):
        lowering.calls[call] += 1
    lowering.syncs.extend(word for word in (".item()", ".cpu()", ".tolist()", "synchronize()") if word in body)


@contextmanager
def observed(lowering: Lowering, *, compile_kernels: bool) -> Generator[None]:
    """Records what inductor does, and stops it from loading kernels and from creating tensors on the device."""
    should_partition, deduce_value = Scheduler.should_partition, UniformValueConstantFolder._deduce_value

    def save_output_code(code: str) -> None:
        lowering.code.append(code)
        _, counts, times = V.graph.count_bytes()
        for (node, words), (_, ms) in zip(counts, times, strict=True):
            lowering.steps.append(Step(node.get_name(), words * 4, ms))

    def precompile(tuner: Any, *_: Any, **__: Any) -> None:
        if not compile_kernels:
            return
        tuner._precompile_worker()
        for result in tuner.compile_results:
            data, forms = result.kernel.metadata, result.kernel.asm
            atomic = re.search(r"\b(?:atom|red)\.", forms["ptx"]) is not None
            lowering.kernels.append(Kernel(data.name, f"sm_{data.target.arch}", len(forms["cubin"]), atomic))

    def post_compile(compiled: CompiledFxGraph, *_: Any, **__: Any) -> None:
        info = compiled.cudagraph_info
        lowering.cuts.extend(info.cudagraph_fail_reasons if info else [])
        if compiled.disabled_cudagraphs_reason:
            lowering.cuts.append(compiled.disabled_cudagraphs_reason)

    def partition(scheduler: Scheduler, node: Any) -> str | None:
        reason = should_partition(scheduler, node)
        if reason and (cut := f"{reason} ({node.get_name()})") not in lowering.cuts:
            lowering.cuts.append(cut)
        return reason

    def deduce(folder: Any, node: fx.Node) -> Any:
        given = node.kwargs
        if "device" in given:
            node.kwargs = {**given, "device": torch.device("cpu")}
        try:
            return deduce_value(folder, node)
        finally:
            node.kwargs = given

    with (
        mock.patch.object(GraphLowering, "save_output_code", staticmethod(save_output_code)),
        mock.patch.object(CachingAutotuner, "precompile", precompile),
        mock.patch.object(CompiledFxGraph, "post_compile", post_compile),
        mock.patch.object(Scheduler, "should_partition", partition),
        mock.patch.object(UniformValueConstantFolder, "_deduce_value", deduce),
    ):
        yield
