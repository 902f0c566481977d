"""What the oldest versions lack that papr-fx runs on: tests of it are left out there, each for a reason given here."""

import inspect
import sys
from importlib.util import find_spec

import pytest
import timm
import torch
import transformers


def release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("+")[0].split(".")[:3] if number.isdecimal())


TORCH, TIMM, TRANSFORMERS = (release(library.__version__) for library in (torch, timm, transformers))

# Before torch 2.12 `checkpoint` is no decorator, and has fewer options.
CHECKPOINT_DECORATES = TORCH >= (2, 12)

# transformers' DINOv3 asks for it.
AUTOCAST_ON_META = TORCH >= (2, 12)
# Layers of transformers 4 are traced through, so they are in regions; those of 5 are called whole. Dense, and merged.
REGIONS_OF_TRANSFORMERS = (2, 2) if TRANSFORMERS < (5,) else (0, 1)


def called_by_checkpoint() -> object:
    """The function that `torch.utils.checkpoint.checkpoint` calls."""
    if CHECKPOINT_DECORATES:
        return vars(torch.utils.checkpoint)["_checkpoint_impl"]
    return inspect.getclosurevars(torch.utils.checkpoint.checkpoint).nonlocals["fn"]


def switch_checkpoints_on(model: transformers.PreTrainedModel) -> None:
    """Newer versions of transformers have another name for it."""
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()


HAS_TORCHCAM = pytest.mark.skipif(find_spec("torchcam") is None, reason="torchcam for Python 3.10 needs numpy 1")
TIMM_ON_META = pytest.mark.skipif(TIMM < (1, 0, 21), reason="timm 1.0.20 reads numbers from tensors: none on the meta device")
ROPE_IN_FLOAT64 = pytest.mark.skipif(TIMM < (1, 0, 21), reason="mixed rotary tables of timm 1.0.20 do not run in float64")
LOADERS_OF_TIMM = pytest.mark.skipif(
    TIMM < (1, 0, 21), reason="timm 1.0.20 loads no data without workers, and says otherwise what a folder lacks"
)
AS_LISTED = pytest.mark.skipif(
    TIMM < (1, 0, 31) or TRANSFORMERS < (5, 23), reason="docs/coverage.md lists the architectures of newer libraries"
)
AS_WRITTEN = pytest.mark.skipif(
    TIMM < (1, 0, 31) or TRANSFORMERS < (5, 23), reason="the graph diff is of the code of newer libraries"
)
MODULES_OF_TRANSFORMERS_5 = pytest.mark.skipif(
    TRANSFORMERS < (5,), reason="the test, as docs/models.md, reads modules, classes and messages of transformers 5"
)
NAMES_RETURN_DICT = pytest.mark.skipif(
    TRANSFORMERS < (5,), reason="towers of transformers 4 take return_dict in a decorator only: no pruned tower takes it"
)
# transformers 5.8 still does, 5.15 does not.
SWIN_OF_TRANSFORMERS = pytest.mark.skipif(
    TRANSFORMERS < (5, 15), reason="the mask of transformers' Swin is filled by assignments to slices, which are not traced"
)

# Filters of warnings of torch itself and of the code that calls it: papr-fx does nothing of what they warn of.
WARNINGS: list[str] = []
if TORCH < (2, 12):
    WARNINGS += [
        "ignore:Please use the new API settings to control TF32:UserWarning",  # inductor asks for the old ones
        "ignore:.*torch.jit.* is deprecated:DeprecationWarning",  # timm scripts activations and boxes
    ]
if sys.version_info[:3] == (3, 13, 0):
    WARNINGS.append("ignore:Guards may run slower:RuntimeWarning")  # dynamo wants 3.13.1

# Files that are not collected, and why.
LEFT_OUT: dict[str, str] = {}
if find_spec("mkdocs") is None:
    LEFT_OUT["test_release.py"] = "Python 3.10 does not read TOML"
    LEFT_OUT["test_site.py"] = "the extra docs is for Python 3.11 and newer"
if TORCH < (2, 12):
    LEFT_OUT["benchmarks/test_cuda_lowering.py"] = "benchmarks.cuda_lowering reads the inductor of newer versions from inside"
