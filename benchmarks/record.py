"""How a measurement runs, the environment it was taken in, and the file that keeps it."""

import json
import platform
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Run:
    """How variants are timed: images or clips in a batch, rounds in which they take turns, device, and whether compiled."""

    batch: int
    rounds: int
    device: torch.device
    compiled: bool = False


def environment(seed: int) -> dict[str, Any]:
    """Device, threads, versions and seed of this run."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "seed": seed,
    }


def write(path: Path, rows: Sequence[Mapping[str, Any]], *, seed: int) -> None:
    """Writes rows and environment as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(seed), "rows": list(rows)}, indent=2) + "\n")


class _Allocations(TorchDispatchMode):
    """Tracks the bytes of live tensors as operations create them."""

    def __init__(self) -> None:
        super().__init__()
        self.living = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage(), given)
        return out

    def _follow(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        if storage._cdata in given or storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.living += storage.nbytes()
        self.peak = max(self.peak, self.living)
        weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.living -= size


def peak_megabytes(call: Callable[[], Any]) -> float:
    """Largest sum of the bytes of activations alive at once while `call` runs without gradients, in MB."""
    counting = _Allocations()
    with torch.no_grad(), counting:
        call()
    return counting.peak / 1e6
