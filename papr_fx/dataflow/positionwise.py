"""Which operations are position-wise: found by running them on numbers, with parameters at unit scale, never by name.

A node f runs on x of a small grid, and on some positions of x, laid out as a grid of k rows and one column:

    position-wise:  f(gather(x)) = gather(f(x))        Linear, 1x1 convolution, channel norm, activation, per-channel scale
    masked:         f(gather(x)) = gather(f(mask(x)))  a sum over positions in which dropped ones are zero (ConvNeXt V2's GRN)

Anything else mixes positions (a window, a norm or mean over space) or depends on the size of the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call

from ..tracing.fakes import scratch_copy
from ..tracing.graphs import ancestors, called, shape_of
from ..tracing.likeness import form_of, kinds_of_modules
from ..tracing.numerics import exact_float32, holds_indices, redraw, relative_error, tensors_of, unit_scale
from ..versions import NormBase

# Axes by letter: batch, channels, frames, rows and columns; or N positions in one axis.
Layout = str
LAYOUTS = ("BCHW", "BHWC", "BCTHW", "BTHWC", "BNC", "BCN")

_COUNT = 20
_GRIDS = {3: {"B": 2, "N": 20}, 4: {"B": 2, "H": 5, "W": 4}, 5: {"B": 2, "T": 2, "H": 5, "W": 2}}  # by number of axes
_KEPT = (17, 2, 9, 4, 11, 13, 0)
_TOLERANCE = 1e-4
_RANDOM_FUNCTIONS = (F.dropout, torch.dropout)
PERMUTATIONS = ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis")


class Verdict(NamedTuple):
    """What a node does with positions.

    Attributes:
        layout: Axes of its value; empty if it is not position-wise.
        masked: Whether it treats dropped positions as zeros.
        reason: Why it is not position-wise.
    """

    layout: Layout = ""
    masked: bool = False
    reason: str = ""


class _RefusedError(Exception):
    """A node does not run on such inputs."""


@dataclass(frozen=True)
class VerdictCache:
    """Verdicts on modules of one model: on one of those that are alike.

    Attributes:
        verdicts: Them, by kind of module and what else it is called with.
        numbers: The numbers of kinds.
    """

    verdicts: dict[tuple[Any, ...], Verdict] = field(default_factory=dict)
    numbers: dict[Hashable, int] = field(default_factory=dict)


class PositionwiseProbe:
    """Runs the nodes of a traced graph on small inputs.

    Args:
        root: The modules that the graph calls.
        cache: Verdicts on modules. It is filled here, and serves other graphs of the same model.
        training: Whether batch norms run in training mode, where they mix positions. All else runs in eval mode.
    """

    def __init__(self, root: nn.Module, cache: VerdictCache, *, training: bool) -> None:
        self._root = root
        self._training = training
        self._random = torch.Generator("cpu").manual_seed(0)
        self._cache = cache.verdicts
        self._kinds = kinds_of_modules(root, cache.numbers)

    def verdict(self, node: fx.Node, layouts: Mapping[fx.Node, Layout]) -> Verdict:
        """What `node` does, given the layouts of its inputs that hold positions. Its other inputs are constants."""
        name = called(node)
        if name in PERMUTATIONS or name == "flatten":
            return _permuted(node, name, layouts)
        if name == "getitem" and shape_of(node.all_input_nodes[0]) is None:
            return Verdict(layouts[node.all_input_nodes[0]])  # one part of a chunk or split
        found = {layouts[n] for n in node.all_input_nodes if n in layouts}
        if len(found) != 1:
            return Verdict(reason=f"combines values of the layouts {' and '.join(sorted(found))}")
        (layout,) = found
        if node.target in _RANDOM_FUNCTIONS:
            return Verdict(layout)
        if node.op != "call_module":
            return self._try(node, layout, layouts, lambda args, kwargs: _call(node, args, kwargs))
        target = str(node.target)
        module = self._root.get_submodule(target)
        given = form_of((node.args, node.kwargs), {n: shape_of(n) for n in node.all_input_nodes if n in layouts})
        key = (self._kinds.get(module, module), layout, self._training, given)
        if key not in self._cache:
            module = scratch_copy(module).eval()
            if any(buffer.is_meta and holds_indices(buffer) for buffer in module.buffers()):
                return Verdict(reason="holds indices without values (meta device)")
            for part in module.modules():
                part.training = self._training and isinstance(part, NormBase)
            run = self._redrawn(module)
            self._cache[key] = self._try(node, layout, layouts, run)
        return self._cache[key]

    def _try(
        self, node: fx.Node, layout: Layout, layouts: Mapping[fx.Node, Layout], call: Callable[[Any, Any], Any]
    ) -> Verdict:
        varying = {n: self._sample(cast("tuple[int, ...]", shape_of(n)), layout) for n in node.all_input_nodes if n in layouts}
        try:
            with torch.no_grad(), exact_float32(), torch.device("cpu"):
                fixed = {n: self._constant(n) for n in node.all_input_nodes if n not in layouts}

                def run(change: Callable[[Tensor, Layout], Tensor]) -> Any:
                    given = fixed | {n: change(value, layout) for n, value in varying.items()}
                    arguments = fx.map_arg((node.args, node.kwargs), lambda n: given[n])
                    try:
                        return call(*arguments)
                    except Exception as error:  # a module may raise anything for a grid that it was not made for
                        raise _RefusedError(type(error).__name__) from error

                if not all(bool(t.isfinite().all()) for t in tensors_of(run(_same)) if t.is_floating_point()):
                    varying = {n: value.abs() for n, value in varying.items()}  # a root, a logarithm
                actual, whole, masked = run(_gathered), run(_same), run(_masked)
        except _RefusedError as error:
            return Verdict(reason=f"failed on the small grid of the probe ({error})")
        for value, is_masked in ((whole, False), (masked, True)):
            for out in dict.fromkeys((layout, *LAYOUTS)):  # a module may permute
                if _agree(actual, value, out):
                    return Verdict(out, masked=is_masked)
        return Verdict(reason="mixes positions")

    def _sample(self, shape: tuple[int, ...], layout: Layout) -> Tensor:
        grid = _GRIDS[len(layout)]
        sizes = [shape[axis] if letter == "C" else grid[letter] for axis, letter in enumerate(layout)]
        return torch.randn(sizes, generator=self._random, device="cpu", dtype=torch.float32)

    def _constant(self, node: fx.Node) -> Any:
        """A value that does not depend on the images. Parameters are redrawn, everything else is computed."""
        if node.op == "get_attr":
            *path, name = str(node.target).split(".")
            value = getattr(self._root.get_submodule(".".join(path)), name)
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return unit_scale(value.shape, self._random, torch.float32) if floating else value
        if node.op == "placeholder" or any(n.op == "placeholder" for n in ancestors(node)):
            raise _RefusedError(f"`{node.name}` depends on the images")
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._constant)
        if node.op == "call_module":  # a parametrisation that computes a weight
            return self._redrawn(scratch_copy(self._root.get_submodule(str(node.target))).eval())(args, kwargs)
        return _call(node, args, kwargs)

    def _redrawn(self, module: nn.Module) -> Callable[[Any, Any], Any]:
        """Calls a module with parameters at unit scale; a scripted one with its own, which cannot be replaced."""
        if isinstance(module, torch.jit.ScriptModule):
            return lambda args, kwargs: module(*args, **kwargs)
        values = redraw(module, self._random, torch.float32)
        return lambda args, kwargs: functional_call(module, values, args, kwargs)


def _agree(actual: Any, whole: Any, layout: Layout) -> bool:
    """Whether `actual` equals `whole` at the kept positions, both laid out as `layout`."""
    tensors = tensors_of(whole)
    if not tensors or any(len(layout) != t.ndim or _count(t, layout) != _COUNT for t in tensors):
        return False
    return relative_error(actual, [_gathered(t, layout) for t in tensors]) <= _TOLERANCE


def _call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return cast(Callable[..., Any], node.target)(*args, **kwargs)


def _permuted(node: fx.Node, name: str, layouts: Mapping[fx.Node, Layout]) -> Verdict:
    """The layout after a permutation, or after the grid was flattened: found by doing it to axes of distinct sizes."""
    layout = layouts[node.all_input_nodes[0]]
    distinct = {"B": 2, "C": 3, "H": 5, "W": 7, "N": 11, "T": 13}
    sizes = [distinct[letter] for letter in layout]
    letters = dict(zip(sizes, layout, strict=True)) | {prod(distinct[letter] for letter in layout if letter in "THW"): "N"}
    try:
        value = _call(node, (torch.empty(sizes, device="cpu"), *node.args[1:]), node.kwargs)
    except (RuntimeError, TypeError, IndexError) as error:
        return Verdict(reason=f"permutes by sizes of the images ({type(error).__name__})")
    moved = "".join(letters.get(size, "?") for size in value.shape)
    ordered = moved.find("T") <= moved.find("H") <= moved.find("W")
    return Verdict(moved) if "?" not in moved and moved[0] == "B" and ordered else Verdict(reason=f"{name} mixes axes")


def _positions(tensor: Tensor, layout: Layout) -> Tensor:
    """(B, n, C)."""
    channels = layout.index("C")
    return tensor.movedim(channels, -1).flatten(1, -2)


def _laid_out(rows: Tensor, layout: Layout) -> Tensor:
    """(B, n, C) as a grid of n x 1 or n x 1 x 1."""
    grid = rows.unflatten(1, (-1, *[1] * (len(layout) - 3)))
    return grid.movedim(-1, layout.index("C"))


def _count(tensor: Tensor, layout: Layout) -> int:
    return prod(size for size, letter in zip(tensor.shape, layout, strict=True) if letter in "THWN")


def _gathered(tensor: Tensor, layout: Layout) -> Tensor:
    return _laid_out(_positions(tensor, layout)[:, _KEPT], layout)


def _masked(tensor: Tensor, layout: Layout) -> Tensor:
    kept = torch.tensor(_KEPT, device=tensor.device)
    keep = torch.zeros(_COUNT, device=tensor.device, dtype=torch.float32).index_fill(0, kept, 1)
    grid = _GRIDS[len(layout)]
    sizes = [grid[letter] if letter in "THWN" else 1 for letter in layout]
    return tensor * keep.view(sizes)


def _same(tensor: Tensor, layout: Layout) -> Tensor:
    return tensor
