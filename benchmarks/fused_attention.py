"""Attention as one library call, as a GPU makes it in half precision. Without a device PyTorch would split it up."""

from __future__ import annotations

from operator import getitem

import torch
import torch.nn.functional as F
from torch import Tensor, fx


def call_fused_attention(gm: fx.GraphModule) -> None:
    """Replaces `scaled_dot_product_attention`: by flash attention, or by memory-efficient attention where there is a mask."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    for node in gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention):
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        if given.get("dropout_p") or given.get("enable_gqa"):
            continue
        inputs = tuple(given[name] for name in names[:3])
        with gm.graph.inserting_before(node):
            if given.get("attn_mask") is not None:
                out = gm.graph.call_function(_efficient_attention, (*inputs, given["attn_mask"], given.get("scale")))
            else:
                causal = given.get("is_causal", False)
                call = gm.graph.call_function(flash, (*inputs, 0.0, causal, False), {"scale": given.get("scale")})
                out = gm.graph.call_function(getitem, (call, 0))
        node.replace_all_uses_with(out)
        gm.graph.erase_node(node)
    gm.recompile()


def _efficient_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None) -> Tensor:
    """Attention with a bias, which flash attention does not take."""
    bias = bias.expand(*query.shape[:-1], key.shape[-2])
    attention = torch.ops.aten._scaled_dot_product_efficient_attention
    return attention(query, key, value, bias, False, scale=scale)[0]
