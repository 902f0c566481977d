"""What the oldest versions lack that papr-fx runs on: tests of it are left out there, each for a reason given here."""

from importlib.util import find_spec

import pytest
import torch

TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])

# Before torch 2.12 `checkpoint` is no decorator, and has fewer options.
CHECKPOINT_DECORATES = TORCH >= (2, 12)

HAS_TORCHCAM = pytest.mark.skipif(find_spec("torchcam") is None, reason="torchcam for Python 3.10 needs numpy 1")

# Files that are not collected, and why.
LEFT_OUT: dict[str, str] = {}
if TORCH < (2, 12):
    LEFT_OUT["benchmarks/test_cuda_lowering.py"] = "benchmarks.cuda_lowering reads the inductor of newer versions from inside"
