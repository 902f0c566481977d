"""Lowers a model for an NVIDIA GPU through inductor and Triton on a machine without one, and records what comes out.

Tensors are fake and nothing is launched. Inductor writes the code that it would write on the GPU, and Triton and its own
assembler compile every kernel to machine code; counts of kernels, of bytes and of what would break a CUDA graph are exact,
times are inductor's roofline over the GPU's data sheet. What only a run can tell stays unknown: which algorithm a library
picks, autotuning, occupancy. Inference only.

PyTorch's internals are patched inside `lower`; see `fake_cuda` for what of that outlives it.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import getitem
from typing import Any, cast
from unittest import mock

import torch
import torch._functorch.config
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.exc import Unsupported, UserError
from torch._inductor import compile_fx
from torch._inductor.async_compile import CompiledTritonKernels
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._inductor.graph import GraphLowering
from torch._inductor.output_code import CompiledFxGraph
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._inductor.scheduler import Scheduler
from torch._inductor.utils import FORBIDDEN_CUDAGRAPH_OPS, BoxedBool, fresh_cache, get_gpu_dram_gbps
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode

from .fake_cuda import Gpu, present


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel in machine code: its name, target, bytes of code, and whether it adds atomically."""

    name: str
    target: str
    code_bytes: int
    atomic: bool


@dataclass(frozen=True)
class Step:
    """A scheduled node of inductor: one launch or call. Bytes read and written, and its estimated time in ms."""

    name: str
    bytes: int
    ms: float


@dataclass
class Lowering:
    """What a model became.

    Attributes:
        graphs: Inductor's graphs: 1 unless the model was broken into several.
        breaks: Why the model could not be recorded as one graph.
        launches: Launches of Triton kernels.
        calls: Calls of library kernels, by name.
        cuts: Why inductor would cut the CUDA graph, or go without.
        syncs: Operations for which the host waits for the device.
        copies: Operations that move a tensor between devices.
        kernels: Compiled kernels, each configuration that Triton would try.
        steps: The schedule, in order.
        bandwidth: Of the device's memory, bytes per ms.
        code: Inductor's wrapper code.
    """

    graphs: int = 0
    breaks: list[str] = field(default_factory=list[str])
    launches: int = 0
    calls: Counter[str] = field(default_factory=Counter[str])
    cuts: list[str] = field(default_factory=list[str])
    syncs: list[str] = field(default_factory=list[str])
    copies: list[str] = field(default_factory=list[str])
    kernels: list[Kernel] = field(default_factory=list[Kernel])
    steps: list[Step] = field(default_factory=list[Step])
    bandwidth: float = 0.0
    code: list[str] = field(default_factory=list[str])

    @property
    def count(self) -> int:
        """Kernels that one call starts, Triton's and libraries'."""
        return self.launches + self.calls.total()

    @property
    def bytes(self) -> int:
        """Bytes of device memory read and written, each buffer once a kernel."""
        return sum(step.bytes for step in self.steps)

    @property
    def roofline_ms(self) -> float:
        """Inductor's estimate. It has none for some library calls, attention among them, which count as 0 here."""
        return sum(step.ms for step in self.steps)

    @property
    def ms(self) -> float:
        """The same, where calls that inductor has no estimate for take the time that their bytes take."""
        return sum(step.ms or step.bytes / self.bandwidth for step in self.steps)


def lower(
    module: nn.Module,
    shape: Sequence[int],
    *,
    dtype: torch.dtype,
    gpu: Gpu,
    flash: bool = True,
    compile_kernels: bool = True,
) -> Lowering:
    """Compiles `module` for `gpu`, without gradients.

    Args:
        module: A model on the CPU; it is copied.
        shape: Shape of the images.
        dtype: Of images and floating-point parameters.
        gpu: See `GPUS`.
        flash: Whether attention is one call, as a GPU would make it in half precision: flash attention without a mask,
            memory-efficient attention with one; otherwise it becomes matrix products and a softmax.
        compile_kernels: Whether Triton compiles the kernels, or only inductor writes them.
    """
    lowering = Lowering()
    module = copy.deepcopy(module)
    with present(gpu), _observed(lowering, compile_kernels=compile_kernels), _settings():
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        lowering.bandwidth = get_gpu_dram_gbps() * 1e6

        def inner(gm: fx.GraphModule, example: Sequence[Any], **options: Any) -> Callable[[list[Any]], list[Any]]:
            lowering.graphs += 1
            _inspect(gm.graph, lowering)
            options["cudagraphs"] = BoxedBool(True)
            compile_fx.compile_fx_inner(gm, example, **options)
            return _never_run(gm.graph, mode)

        def backend(gm: fx.GraphModule, example: list[Any]) -> Any:
            if flash:
                _call_flash_attention(gm)
            return compile_fx.compile_fx(gm, example, inner_compile=cast(Any, inner))

        with mode, torch.no_grad():
            _to_fake_cuda(module, dtype)
            images = torch.empty(tuple(shape), dtype=dtype, device="cuda")
            try:
                torch.compile(module, backend=backend, fullgraph=True, dynamic=False)(images)
            except (Unsupported, UserError) as refusal:
                lowering.breaks.append(str(refusal))
        torch.compiler.reset()
    for code in lowering.code:
        _count_kernels(code, lowering)
    return lowering


@contextmanager
def _settings() -> Generator[None]:
    """Fresh caches in a temporary folder, one process, and CUDA graphs wanted, so that inductor says what prevents them."""
    inductor = {
        "compile_threads": 1,  # patches do not reach workers
        "fx_graph_cache": False,
        "triton.cudagraphs": True,
        "triton.autotune_at_compile_time": False,
        "max_autotune": False,
        "shape_padding": False,  # it times paddings
        "use_static_triton_launcher": False,
    }
    with (
        fresh_cache(),
        torch._inductor.config.patch(inductor),  # pyright: ignore[reportAttributeAccessIssue]
        torch._functorch.config.patch(enable_autograd_cache=False),  # pyright: ignore[reportAttributeAccessIssue]
    ):
        CompiledTritonKernels.cache_clear()
        torch.compiler.reset()
        yield


def _to_fake_cuda(module: nn.Module, dtype: torch.dtype) -> None:
    """Puts fakes in place of all parameters and buffers: under a fake mode Module.to() cannot."""
    for child in module.modules():
        for table in cast("tuple[dict[str, Any], ...]", (child._parameters, child._buffers)):
            for name, tensor in table.items():
                if tensor is not None:
                    kind = dtype if tensor.is_floating_point() else tensor.dtype
                    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device="cuda")
                    table[name] = nn.Parameter(fake, False) if isinstance(tensor, nn.Parameter) else fake


def _call_flash_attention(gm: fx.GraphModule) -> None:
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    for node in gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention):
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        if given.get("dropout_p") or given.get("enable_gqa"):
            continue
        inputs = tuple(given[name] for name in names[:3])
        with gm.graph.inserting_before(node):
            if given.get("attn_mask") is not None:
                out = gm.graph.call_function(_efficient_attention, (*inputs, given["attn_mask"], given.get("scale")))
            else:
                causal = given.get("is_causal", False)
                call = gm.graph.call_function(flash, (*inputs, 0.0, causal, False), {"scale": given.get("scale")})
                out = gm.graph.call_function(getitem, (call, 0))
        node.replace_all_uses_with(out)
        gm.graph.erase_node(node)
    gm.recompile()


def _efficient_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None) -> Tensor:
    """Attention with a bias, for which flash attention has no place."""
    bias = bias.expand(*query.shape[:-1], key.shape[-2])
    attention = torch.ops.aten._scaled_dot_product_efficient_attention
    return attention(query, key, value, bias, False, scale=scale)[0]


def _inspect(graph: fx.Graph, lowering: Lowering) -> None:
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


def _never_run(graph: fx.Graph, mode: FakeTensorMode) -> Callable[[list[Any]], list[Any]]:
    """Stands for compiled code: takes the arguments and returns fresh fakes."""
    outputs = [node.meta["val"] if isinstance(node, fx.Node) else node for node in graph.output_node().args[0]]  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]

    def number(size: Any) -> int:
        return size if isinstance(size, int) else 8  # depends on data: the graph is at fault already, any size will do

    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        sizes, strides = ([number(size) for size in sizes] for sizes in (value.shape, value.stride()))
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)

    def run(arguments: list[Any]) -> list[Any]:
        arguments.clear()
        with mode:
            return [fresh(value) for value in outputs]

    run._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]
    return run


def _count_kernels(code: str, lowering: Lowering) -> None:
    body = re.sub(r"async_compile\.triton\(.*?'''.*?'''", "", code, flags=re.DOTALL)
    body = body.split("def benchmark_compiled_module")[0].split("def get_args")[0]
    lowering.launches += len(re.findall(r"\btriton_\w+\.run\(", body))
    for call in re.findall(r"(?<![\w.])(?:extern_kernels|(?:torch\.ops\.)?aten)\.(\w+)[\w.]*\(", body):
        lowering.calls[call] += 1
    lowering.syncs.extend(word for word in (".item()", ".cpu()", ".tolist()", "synchronize()") if word in body)


@contextmanager
def _observed(lowering: Lowering, *, compile_kernels: bool) -> Generator[None]:
    """Records what inductor does; keeps it from loading kernels, and from making a tensor on the device."""
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
