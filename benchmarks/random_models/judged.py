"""One model for the record. Workers find this function here: not in `__main__`, which `python -m` does not give them."""

from __future__ import annotations

import time
from typing import Any

import torch

from .draw import draw
from .judge import judge
from .records import record


def judged(number: int) -> dict[str, Any]:
    """The line of the record for one model."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    result = judge(draw(number))
    return record(number, result, time.perf_counter() - start)
