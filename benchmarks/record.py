"""Where and with what a measurement was taken, and the file that keeps it."""

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch


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
