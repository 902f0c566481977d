"""Folds batch norms into the convolutions before them, in a frozen graph: the same map with fewer passes over memory."""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import fuse_conv_bn_weights

from ..versions import BatchNorm

_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d}


@dataclass(frozen=True)
class _Norm:
    """The parameters of a batch norm in eval mode."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def fold_batch_norms(gm: fx.GraphModule) -> int:
    """Folds each batch norm that is the only reader of a convolution.

    Args:
        gm: A graph in eval mode that owns its weights; folded ones replace them.

    Returns:
        The number of folded batch norms.
    """
    folded = 0
    for node in list(gm.graph.nodes):
        norm = _norm(gm, node)
        conv = node.args[0] if norm and node.args else None
        if norm is None or not isinstance(conv, fx.Node) or len(conv.users) != 1:
            continue
        weights = _weights(gm, conv)
        if weights is None:
            continue
        _replace_weights(gm, conv, *_folded(norm, *weights))
        node.replace_all_uses_with(conv)
        gm.graph.erase_node(node)
        folded += 1
    gm.graph.eliminate_dead_code()
    gm.recompile()
    gm.delete_all_unused_submodules()
    return folded


def kernel_size(gm: fx.GraphModule, node: fx.Node) -> tuple[int, ...] | None:
    """The spatial sizes of the kernel if a node is a convolution, by module or by function; else None."""
    if node.op == "call_module":
        module = gm.get_submodule(cast(str, node.target))
        return tuple(module.weight.shape[2:]) if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else None
    if node.op == "call_function" and node.target in _CONVOLUTIONS and len(node.args) > 1:
        kernel = _constant(gm, node.args[1])
        return None if kernel is None else tuple(kernel.shape[2:])
    return None


def _norm(gm: fx.GraphModule, node: fx.Node) -> _Norm | None:
    """The parameters of a batch norm node with running statistics; None for anything else."""
    if node.op == "call_module":
        module = gm.get_submodule(cast(str, node.target))
        if isinstance(module, BatchNorm) and type(module).forward is BatchNorm.forward and module.running_mean is not None:
            return _Norm(module.running_mean, cast(Tensor, module.running_var), module.weight, module.bias, module.eps)
    if node.op == "call_function" and node.target is F.batch_norm:
        bound = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        given = bound.arguments
        values = [_constant(gm, given[key]) for key in ("running_mean", "running_var", "weight", "bias")]
        if not given["training"] and values[0] is not None and values[1] is not None:
            return _Norm(values[0], values[1], values[2], values[3], float(given["eps"]))
    return None


def _weights(gm: fx.GraphModule, conv: fx.Node) -> tuple[Tensor, Tensor | None] | None:
    """Kernel and bias of a convolution node, if both are constants and its module is called once."""
    if conv.op == "call_module":
        module = gm.get_submodule(cast(str, conv.target))
        calls = len(gm.graph.find_nodes(op="call_module", target=conv.target))
        if type(module) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d) or calls != 1:
            return None
        return cast(Tensor, module.weight), cast("Tensor | None", module.bias)
    if conv.op == "call_function" and conv.target in _CONVOLUTIONS and not conv.kwargs and len(conv.args) >= 2:
        kernel = _constant(gm, conv.args[1])
        bias = conv.args[2] if len(conv.args) > 2 else None
        if kernel is not None and (bias is None or _constant(gm, bias) is not None):
            return kernel, _constant(gm, bias)
    return None


def _constant(gm: fx.GraphModule, arg: object) -> Tensor | None:
    """The tensor that an argument reads from the module; None for anything else."""
    if isinstance(arg, fx.Node) and arg.op == "get_attr":
        value = operator.attrgetter(cast(str, arg.target))(gm)
        return value if isinstance(value, Tensor) else None
    return None


def _folded(norm: _Norm, kernel: Tensor, bias: Tensor | None) -> tuple[nn.Parameter, nn.Parameter]:
    """Kernel and bias of the convolution and the norm together."""
    return fuse_conv_bn_weights(
        kernel,
        bias,
        norm.mean,
        norm.var,
        norm.eps,
        cast(Tensor, norm.weight),  # the function takes None for both, though its annotation does not say so
        cast(Tensor, norm.bias),
    )


def _replace_weights(gm: fx.GraphModule, conv: fx.Node, kernel: nn.Parameter, bias: nn.Parameter) -> None:
    """Gives a convolution node a new kernel and bias."""
    if conv.op == "call_module":
        module: Any = gm.get_submodule(cast(str, conv.target))
        module.weight, module.bias = kernel, bias
        return
    with gm.graph.inserting_before(conv):
        arguments: list[Any] = [*conv.args, None][: max(3, len(conv.args))]
        for place, (name, value) in enumerate((("weight", kernel), ("bias", bias)), start=1):
            gm.register_parameter(f"{conv.name}_{name}", value)
            arguments[place] = gm.graph.get_attr(f"{conv.name}_{name}")
        conv.args = tuple(arguments)
