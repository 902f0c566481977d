"""Lets PyTorch, inductor and Triton believe that an NVIDIA GPU is there, only to compile: nothing can run on it.

PyTorch offers no public way to do this. `present` patches its internals and restores them, except the device guard of the
CUDA backend, which can be set only once per process.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.utils
import torch.utils._triton
from torch import Tensor
from torch._dynamo import device_interface
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


@dataclass(frozen=True)
class Gpu:
    """What inductor and Triton ask of a device: sizes in bytes, clocks in kHz. `name` is that of inductor's data sheets."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int
    memory_clock: int
    clock: int
    shared_memory: int
    shared_memory_of_multiprocessor: int
    cache: int


GPUS = {
    90: Gpu("NVIDIA H100", (9, 0), 132, 80 << 30, 2619000, 1980000, 232448, 233472, 50 << 20),
    80: Gpu("NVIDIA A100", (8, 0), 108, 80 << 30, 1593000, 1410000, 166912, 167936, 40 << 20),
}


def _always(value: Any) -> Callable[..., Any]:
    """A function that returns `value` for any arguments."""

    def answer(*_: object, **__: object) -> Any:
        return value

    return answer


class _Guard:
    """Stands for `torch.cuda.device`."""

    def __init__(self, *_: Any) -> None:
        self.prev_idx = self.idx = 0

    def __enter__(self) -> _Guard:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def _driver(gpu: Gpu) -> Any:
    """What Triton asks of its driver while it compiles."""
    limits = {
        "max_shared_mem": gpu.shared_memory,
        "multiprocessor_count": gpu.multiprocessors,
        "warpSize": 32,
        "max_num_regs": 65536,
        "sm_clock_rate": gpu.clock,
        "mem_clock_rate": gpu.memory_clock,
        "mem_bus_width": 5120,
    }
    major, minor = gpu.capability
    answers: dict[str, Any] = {
        "get_current_target": GPUTarget("cuda", 10 * major + minor, 32),
        "get_current_device": 0,
        "get_current_stream": 0,
        "set_current_device": None,
        "get_active_torch_device": torch.device("cuda", 0),
        "is_active": True,
        "get_device_capability": gpu.capability,
        "get_device_interface": torch.cuda,
    }
    methods = {name: _always(value) for name, value in answers.items()}
    return SimpleNamespace(utils=SimpleNamespace(get_device_properties=_always(limits)), **methods)


def _properties(gpu: Gpu) -> SimpleNamespace:
    """What `torch.cuda.get_device_properties` would return."""
    return SimpleNamespace(
        name=gpu.name,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        multi_processor_count=gpu.multiprocessors,
        warp_size=32,
        total_memory=gpu.memory,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=gpu.shared_memory,
        shared_memory_per_multiprocessor=gpu.shared_memory_of_multiprocessor,
        L2_cache_size=gpu.cache,
        gcnArchName="",
        uuid="",
        is_integrated=0,
        is_multi_gpu_board=0,
        clock_rate=gpu.clock,
        memory_clock_rate=gpu.memory_clock,
        memory_bus_width=5120,
        pci_bus_id=0,
        pci_device_id=0,
        pci_domain_id=0,
    )


def _convolution_format(images: Tensor, kernel: Tensor, _backend: object) -> torch.memory_format:
    """The layout of cuDNN's results; without a device PyTorch takes that of the slow fallback, which is contiguous."""
    for tensor in (images, kernel):
        if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format


@contextmanager
def present(gpu: Gpu) -> Generator[None]:
    """Lets PyTorch, inductor and Triton believe that `gpu` is there."""
    properties = _properties(gpu)
    shared: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "is_bf16_supported": True,
        "set_device": None,
        "synchronize": None,
        "current_stream": SimpleNamespace(cuda_stream=0, stream_id=0, device_index=0, device_type=1),
        "memory_allocated": 0,
    }
    public: dict[str, Any] = {
        "get_device_capability": gpu.capability,
        "get_device_name": gpu.name,
        "is_tf32_supported": True,
        "_lazy_init": None,
        "is_initialized": True,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "mem_get_info": (gpu.memory, gpu.memory),
        "is_current_stream_capturing": False,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    internal: dict[str, Any] = {"exchange_device": 0, "maybe_exchange_device": 0, "get_raw_stream": 0}
    modules = (torch.utils._triton, torch._inductor.utils)
    cached = [value for module in modules for value in vars(module).values() if hasattr(value, "cache_clear")]
    cached.append(DeviceProperties.create)
    active = driver._active
    with ExitStack() as stack:
        for name, value in (shared | public).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, _always(value)))
        for name, value in (shared | internal).items():
            stack.enter_context(mock.patch.object(device_interface.CudaInterface, name, staticmethod(_always(value))))
        for owner, name in ((torch.cuda, "device"), (torch.cuda, "_DeviceGuard"), (device_interface.CudaInterface, "device")):
            stack.enter_context(mock.patch.object(owner, name, _Guard))
        stack.enter_context(mock.patch.dict(device_interface.caching_worker_device_properties, {"cuda": [properties]}))
        stack.enter_context(mock.patch.dict(device_interface.caching_worker_current_devices, {"cuda": 0}))
        torch._C._ensureCUDADeviceGuardSet()  # pyright: ignore[reportAttributeAccessIssue]  # a guard that does nothing
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context"))
        stack.enter_context(mock.patch.object(torch._C, "_conv_determine_backend_memory_format", _convolution_format))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu"))
        for function in cached:
            function.cache_clear()
        driver.set_active(_driver(gpu))
        try:
            yield
        finally:
            driver._active = active
            for function in cached:
                function.cache_clear()
