"""Lowers a model for an NVIDIA GPU through inductor and Triton on a machine without one, and records the result.

Tensors are fake and nothing is launched. Inductor writes the code that it would write on the GPU, and Triton and its own
assembler compile every kernel to machine code. Counts of kernels, of bytes and of what would break a CUDA graph are exact;
times are inductor's roofline over the GPU's data sheet. Only a run can tell which algorithm a library picks, autotuning and
occupancy. Inference only.

`lower` patches PyTorch's internals while it runs; `fake_cuda` says what of that remains afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, fx, nn
from torch._dynamo.exc import Unsupported, UserError
from torch._inductor import compile_fx
from torch._inductor.async_compile import CompiledTritonKernels
from torch._inductor.utils import BoxedBool, fresh_cache, get_gpu_dram_gbps
from torch._subclasses.fake_tensor import FakeTensorMode

from .fake_cuda import Gpu, present
from .fused_attention import call_fused_attention
from .lowered import Lowering
from .observe import count_kernels, inspect_graph, observed


@dataclass(frozen=True)
class Target:
    """What a model is lowered for.

    Attributes:
        gpu: One of `GPUS`.
        dtype: Of images and floating-point parameters.
        flash: Whether attention is one call, as a GPU would make it in half precision: flash attention without a mask,
            memory-efficient attention with one. Otherwise it becomes matrix products and a softmax.
        compile_kernels: Whether Triton compiles the kernels, or inductor only writes them.
    """

    gpu: Gpu
    dtype: torch.dtype
    flash: bool = True
    compile_kernels: bool = True


def lower(module: nn.Module, shape: Sequence[int], target: Target) -> Lowering:
    """Compiles `module` for a GPU, without gradients.

    Args:
        module: A model on the CPU; it is copied.
        shape: Shape of the images.
        target: The GPU, and how to compile for it.
    """
    lowering = Lowering()
    module = copy.deepcopy(module)
    with present(target.gpu), observed(lowering, compile_kernels=target.compile_kernels), _settings():
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        lowering.bandwidth = get_gpu_dram_gbps() * 1e6

        def inner(gm: fx.GraphModule, example: Sequence[Any], **options: Any) -> Callable[[list[Any]], list[Any]]:
            lowering.graphs += 1
            inspect_graph(gm.graph, lowering)
            options["cudagraphs"] = BoxedBool(True)
            compile_fx.compile_fx_inner(gm, example, **options)
            return _never_run(gm.graph, mode)

        def backend(gm: fx.GraphModule, example: list[Any]) -> Any:
            if target.flash:
                call_fused_attention(gm)
            return compile_fx.compile_fx(gm, example, inner_compile=cast(Any, inner))

        with mode, torch.no_grad():
            _to_fake_cuda(module, target.dtype)
            images = torch.empty(tuple(shape), dtype=target.dtype, device="cuda")
            try:
                torch.compile(module, backend=backend, fullgraph=True, dynamic=False)(images)
            except (Unsupported, UserError) as refusal:
                lowering.breaks.append(str(refusal))
        torch.compiler.reset()
    for code in lowering.code:
        count_kernels(code, lowering)
    return lowering


@contextmanager
def _settings() -> Generator[None]:
    """Fresh caches in a temporary folder, one process, and CUDA graphs requested, so that inductor says what prevents them."""
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
    """Replaces all parameters and buffers by fakes, which Module.to() cannot do under a fake mode."""
    for child in module.modules():
        for table in cast("tuple[dict[str, Any], ...]", (child._parameters, child._buffers)):
            for name, tensor in table.items():
                if tensor is not None:
                    kind = dtype if tensor.is_floating_point() else tensor.dtype
                    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device="cuda")
                    table[name] = nn.Parameter(fake, False) if isinstance(tensor, nn.Parameter) else fake


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
