"""Memory of this process once what nobody holds has gone: resident bytes, live tensors and graph modules."""

import ctypes
import gc
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx
from torch.fx.graph_module import _loader


@dataclass(frozen=True)
class Sample:
    """What a process holds at one moment.

    Attributes:
        minutes: When, since the start.
        megabytes: Resident memory, in MB (10^6 bytes).
        tensors: Live tensors that Python knows.
        graph_modules: Live graph modules.
        sources: Source texts that torch.fx keeps of the code that it made.
    """

    minutes: float
    megabytes: float
    tensors: int
    graph_modules: int
    sources: int


def sample(minutes: float) -> Sample:
    """Collects garbage, gives free memory back to the system where the C library can, and looks."""
    for _ in range(2):  # what the first collection frees may have held more
        gc.collect()
    trim()
    kinds = [type(held) for held in gc.get_objects()]
    tensors = sum(issubclass(kind, torch.Tensor) for kind in kinds)
    modules = sum(issubclass(kind, fx.GraphModule) for kind in kinds)
    return Sample(minutes, resident() / 1e6, tensors, modules, len(_loader.eval_cache))


def resident() -> int:
    """Resident bytes of this process, on Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def trim() -> None:
    """Gives free memory back to the system, with glibc."""
    give = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give is not None:
        give(0)
