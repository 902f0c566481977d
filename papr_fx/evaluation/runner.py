"""Calls a model on a batch, in smaller parts if the memory is too small for the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.utils.decay_batch import check_batch_size_retry, decay_batch_step
from torch import Tensor

from ..tracing.numerics import tensors_of


class Runner:
    """Calls a model, and halves the batch until it fits into memory.

    Args:
        module: The model, possibly compiled.
        autocast: Lower precision to run in, if any.
        views: Whether a sample is several views, whose probabilities are averaged.
    """

    def __init__(self, module: Callable[[Tensor], Any], *, autocast: torch.dtype | None = None, views: bool = False) -> None:
        self.module = module
        self.autocast = autocast
        self.views = views
        self.largest = 0  # the largest batch that fits; 0 until one has failed

    def __call__(self, inputs: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W); mean probabilities (B, classes) of views (B, V, ...)."""
        if not self.views:
            return self._in_parts(inputs)
        scores = self._in_parts(inputs.flatten(0, 1)).softmax(-1)  # (B * V, classes)
        return scores.unflatten(0, inputs.shape[:2]).mean(1)

    def _in_parts(self, inputs: Tensor) -> Tensor:
        while True:
            try:
                parts = inputs.split(self.largest or len(inputs))
                return torch.cat([self._logits(part) for part in parts])
            except RuntimeError as error:
                smaller = decay_batch_step(self.largest or len(inputs), num_intra_steps=1)
                if not _is_out_of_memory(error) or not smaller:
                    raise
                self.largest = smaller
            if inputs.is_cuda:
                torch.cuda.empty_cache()

    def _logits(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            return tensors_of(self.module(images))[0].float()


def _is_out_of_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    says_so = "out of memory" in text or "alloc_failed" in text or ("alloc" in text and "memory" in text)
    return isinstance(error, torch.OutOfMemoryError) or (says_so and check_batch_size_retry(text))
