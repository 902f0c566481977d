"""What every part of a proof needs: runs with other parameters, and what may go wrong in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import SiteError, VerifyError
from ..tracing.fakes import MODEL_ERRORS

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}


class PrecisionError(VerifyError):
    """The model does not run in the precision of the proof, or its graph is not the model there: it may fix a dtype."""


class ComparisonError(SiteError):
    """Two results differ by too much, or too little where they should: it may be noise."""


def run(module: nn.Module, values: dict[str, Tensor], *inputs: Tensor) -> Any:
    """Calls `module` with `values` for the tensors that it has of them, and its other tensors in the images' dtype.

    Raises:
        PrecisionError: It does not run.
    """
    own = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    given = {name: values.get(name, t.to(inputs[0].dtype) if t.is_floating_point() else t) for name, t in own}
    try:
        return functional_call(module, given, inputs)
    except MODEL_ERRORS as error:
        raise PrecisionError(
            f"the proof could not run {type(module).__name__} in {inputs[0].dtype}: {type(error).__name__}: {error}"
        ) from error
