"""All that differs between a CUDA device and the CPU on which a dry run walks through."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

# torch.compile's modes by their names here.
_MODES = {"compiled": "default", "graphs": "reduce-overhead", "autotune": "max-autotune-no-cudagraphs"}
_SAMPLE_MS = 20.0  # calls are timed in samples of this length, so that launches overlap as they do in use


@dataclass(frozen=True)
class Device:
    """Where a process runs.

    Attributes:
        kind: "cuda" or "cpu".
    """

    kind: str

    @property
    def cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.kind == "cuda"

    def prepare(self) -> None:
        """Settings of a process: few threads, since many processes run; no TF32, so that float32 is compared in float32."""
        torch.set_num_threads(2 if self.cuda else 1)
        torch.backends.cudnn.allow_tf32 = False
        torch.manual_seed(0)

    def compiled(self, module: nn.Module, mode: str) -> Callable[..., Any]:
        """The module in a mode: "eager", "compiled", "graphs" (with CUDA graphs) or "autotune". One graph, one shape."""
        if mode == "eager":
            return module
        if not self.cuda:
            return torch.compile(module, backend="eager", fullgraph=True, dynamic=False)
        return torch.compile(module, mode=_MODES[mode], fullgraph=True, dynamic=False)

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def sample(self, call: Callable[[], Any], calls: int) -> float:
        """Mean time of one of several calls in a row, in ms: by CUDA events, or the clock of a CPU."""
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(calls):
                call()
            return 1e3 * (time.perf_counter() - start) / calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / calls

    def calls_of(self, milliseconds: float) -> int:
        """How many calls make one sample."""
        return min(200, max(1, ceil(_SAMPLE_MS / max(milliseconds, 1e-3)))) if self.cuda else 1

    def start_peak(self) -> None:
        """Begins to watch the largest use of memory."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak_megabytes(self) -> float | None:
        """Largest use of device memory since `start_peak`, weights included; None on a CPU."""
        return torch.cuda.max_memory_allocated() / 1e6 if self.cuda else None

    def free_memory(self) -> None:
        """Gives back what nobody uses: other processes need it."""
        if self.cuda:
            torch.cuda.empty_cache()

    def waits(self, call: Callable[[], Any]) -> str:
        """Where the host waits for the device during a call, in words; empty if it does not, or on a CPU."""
        if not self.cuda:
            call()
            return ""
        self.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            return str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return ""

    def dropped_graphs(self) -> int:
        """How many CUDA graphs inductor left out, in this process."""
        return counters["inductor"]["cudagraph_skips"]

    def dearest_kernels(self, call: Callable[[], Any], calls: int = 3, top: int = 10) -> list[dict[str, Any]]:
        """The kernels (on a CPU: operations) that take most time: launches and ms of one call."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
        with profile(activities=activities) as profiled:
            for _ in range(calls):
                call()
            self.synchronize()
        found: list[dict[str, Any]] = []
        for event in profiled.key_averages():
            micro = event.self_device_time_total if self.cuda else event.self_cpu_time_total
            if micro > 0:
                found.append({"kernel": event.key[:100], "launches": event.count / calls, "ms": micro / calls / 1e3})
        return sorted(found, key=lambda row: -row["ms"])[:top]
