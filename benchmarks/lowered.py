"""The record of a lowering: kernels, library calls, memory traffic, and what would break a CUDA graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


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
    """What a model became when it was lowered.

    Attributes:
        graphs: Inductor's graphs: 1 unless the model was broken into several.
        breaks: Why the model could not be recorded as one graph.
        launches: Launches of Triton kernels.
        calls: Calls of library kernels, by name.
        cuts: Why inductor would split the CUDA graph, or use none.
        syncs: Operations for which the host waits for the device.
        copies: Operations that move a tensor between devices.
        kernels: Compiled kernels, one for each configuration that Triton would try.
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
        """Bytes of device memory read and written, each buffer once per kernel."""
        return sum(step.bytes for step in self.steps)

    @property
    def roofline_ms(self) -> float:
        """Inductor's estimate. It has none for some library calls, such as attention, which count as 0 here."""
        return sum(step.ms for step in self.steps)

    @property
    def ms(self) -> float:
        """The same, but a call without an estimate takes as long as moving its bytes."""
        return sum(step.ms or step.bytes / self.bandwidth for step in self.steps)
