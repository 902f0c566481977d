"""What differs between versions of torch, and what papr-fx takes of torch that torch does not publish.

A new release of torch can break these lines only. `papr_fx.requirements` says which versions there are.
"""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any, cast

import torch
import torch.fx._symbolic_trace
from torch import fx
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.graph import _format_target as format_target
from torch.fx.graph_module import _loader
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import sdpa_flop_count

__all__ = [
    "BatchNorm",
    "CheckpointCall",
    "FakeTensor",
    "FakeTensorMode",
    "NormBase",
    "TorchDispatchMode",
    "flop_formulas",
    "forget_source",
    "format_target",
    "is_compiled",
    "is_transformed",
    "is_wrapped",
    "make_products_exact",
    "redirect_checkpoint",
    "symbolic_tracing",
    "tree_leaves",
    "without_types",
]

_Args = tuple[Any, ...]
_Options = Mapping[str, Any]
_Undo = Callable[[], None]
CheckpointCall = Callable[[Callable[..., Any], _Args, _Options, _Options], Any]
CheckpointHandler = Callable[[CheckpointCall, Callable[..., Any], _Args, _Options, _Options], Any]


def make_products_exact() -> _Undo:
    """Makes float32 products exact on every device; returns what undoes it."""
    backends: Any = torch.backends  # its settings are made at run time
    settings = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"

    def undo() -> None:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision

    return undo


def symbolic_tracing() -> AbstractContextManager[Any]:
    """Says to code that asks for it that this thread traces; nothing before torch 2.12, which would say so to all threads."""
    said = getattr(torch.fx._symbolic_trace, "_is_fx_tracing_context", None)
    return nullcontext() if said is None else said(True)


def is_wrapped(names: dict[str, Any], name: str) -> bool:
    """Whether `torch.fx.wrap` was called for `name` in a module with these global names."""
    return (id(names), name) in torch.fx._symbolic_trace._wrapped_fns_to_patch


def without_types(graph: fx.Graph) -> fx.Graph:
    """The graph itself, without what torch 2.9 pickles in the place of its nodes' types: their targets."""
    for node in graph.nodes:
        node.type = None if node.type == node.target else node.type
    return graph


def forget_source(file: str) -> None:
    """Removes the source text that `torch.fx` keeps of code that it made, by the name of the file that the code states.

    A name that says what the code is, as of `enrich_profiler_metadata`, may be that of other code too: its text stays.
    """
    if file.startswith("<eval_with_key>"):
        _loader.eval_cache.pop(file, None)
        linecache.cache.pop(file, None)


def is_compiled(module: object) -> bool:
    """Whether a module is what `torch.compile` returned."""
    return isinstance(module, torch._dynamo.OptimizedModule)


def is_transformed() -> bool:
    """Whether the code that runs is inside `vmap`, `grad` or another transformation of `torch.func`."""
    return peek_interpreter_stack() is not None  # pyright: ignore[reportUnnecessaryComparison]


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Fused attention on a CPU, which torch's flop counter has no formula for."""

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    return {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}


def redirect_checkpoint(handle: CheckpointHandler) -> _Undo:
    """Sends all calls of `torch.utils.checkpoint.checkpoint` to `handle`; returns what undoes it.

    Code may have imported `checkpoint` to anywhere, or bound it in a partial. So what `checkpoint` itself calls is replaced.

    Args:
        handle: Takes the plain call, and what it would be given: the function, its arguments by place and by name, and the
            options of `checkpoint` that differ from their defaults.
    """
    inner = "_checkpoint_impl"
    if not hasattr(checkpoint, inner):
        return _redirect_checkpoint_before_2_12(handle)
    original = getattr(checkpoint, inner)
    defaults = {name: parameter.default for name, parameter in inspect.signature(original).parameters.items()}

    def plain(function: Callable[..., Any], args: _Args, kwargs: _Options, options: _Options) -> Any:
        return original(function, args, kwargs, **options)

    def call(function: Callable[..., Any], args: _Args, kwargs: _Options, **options: Any) -> Any:
        given = {name: value for name, value in options.items() if value is not defaults[name]}
        return handle(plain, function, args, kwargs, given)

    setattr(checkpoint, inner, call)
    return lambda: setattr(checkpoint, inner, original)


def _redirect_checkpoint_before_2_12(handle: CheckpointHandler) -> _Undo:
    """The same before torch 2.12, where `checkpoint` is a function in the closure of its wrapper."""
    wrapper = cast(FunctionType, checkpoint.checkpoint)
    cell = dict(zip(wrapper.__code__.co_freevars, wrapper.__closure__ or (), strict=True))["fn"]
    original = cell.cell_contents
    defaults = {name: option.default for name, option in inspect.signature(original).parameters.items()}
    defaults = {**defaults, "preserve_rng_state": True}
    names = defaults.keys() - {"function", "args", "kwargs"}

    def plain(function: Callable[..., Any], args: _Args, kwargs: _Options, options: _Options) -> Any:
        return original(function, *args, **options, **kwargs)

    def call(function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        options = {name: named.pop(name) for name in defaults if name in names & named.keys()}
        given = {name: value for name, value in options.items() if value is not defaults[name]}
        return handle(plain, function, args, named, given)

    cell.cell_contents = call
    return lambda: setattr(cell, "cell_contents", original)
