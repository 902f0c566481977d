"""Multiply-accumulates (MACs) of a module, counted by torch's flop counter on fake tensors: half the FLOPs it reports."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .trace import fake_like, faking, sandbox


def _cpu_attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Fused attention on a CPU, which the flop counter has no formula for."""
    return sdpa_flop_count(query, key, value)


_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops}


def count_macs(module: nn.Module, images: Tensor) -> int:
    """MACs of one forward pass over one sample shaped like `images` (B, C, H, W): convolutions and matrix products."""
    mode, fake = fake_like(images, 1)
    copied = sandbox(module)
    detached = {name: tensor.detach() for name, tensor in [*copied.named_parameters(), *copied.named_buffers()]}
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with faking(mode), counter:
        functional_call(copied, detached, (fake,))
    return counter.get_total_flops() // 2
