"""The proof of a rewrite: on the model itself, with parameters that cannot hide a fault.

A rewritten graph whose choice of positions is free (an input) is compared with the model. Parameters are redrawn at unit
scale first: trained or fresh ones may be so small (layer scales of 1e-6, bias tables of zeros) that a wrong rewrite passes.

1. Tracing: the dense graph gives the model's output to the bit.
2. Permutation: given all positions in random order, the rewritten graph gives the model's output.
3. Negative control: with one position replaced by another, it does not. Else the proof sees nothing.
4. Geometry: changing one patch of the image moves the token that the map scores for it, and no prefix token.
5. Lengths: with some positions only, the output does not depend on their order.

A model whose code differs in training mode has a second graph: it is compared with the model in that mode, dropout off.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from .errors import VerifyError
from .module import PrunedModule, shell
from .numerics import exact_float32, relative_error, tensors_of
from .passes import prune_tokens
from .trace import clone, cut

# Not the batch size that was traced: a frozen one shows.
_BATCH = 3
_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}


class Proof(NamedTuple):
    """Relative errors found: those that had to be small, and the control that had to be large."""

    permutation: float
    order: float
    control: float
    tolerance: float


@torch.no_grad()
def prove(model: nn.Module, gm: PrunedModule) -> Proof:
    """Proves that `gm` is `model` on fewer tokens; both are left as they are.

    Args:
        model: The model that was transformed.
        gm: The result.

    Raises:
        VerifyError: A part of the proof fails; the message names the part, the site and the error.
    """
    plan = replace(gm.plan, z=0.5)
    example = gm.example()
    dtype = example.dtype if example.dtype == torch.float64 else torch.float32
    random = torch.Generator(example.device).manual_seed(0)
    images = torch.randn((_BATCH, *example.shape[1:]), generator=random, device=example.device, dtype=dtype)
    values = redraw(model, random, dtype)
    site = prune_tokens.find_site(plan.dense_graph(False), plan.blocks)
    where = f"at `{site.stream.name}` in front of `{site.block.target}`"
    root = clone(shell(gm)).eval()
    dense = fx.GraphModule(root, plan.dense_graph(False))
    free = _free_keep(root, plan.rewrite(False))
    tolerance = _TOLERANCES[dtype]

    with exact_float32():
        reference = clone(model).eval()
        expected = _run(reference, values, images)
        _check_finite(expected)
        _check_traced(_run(dense, values, images), expected, plan.name)
        _check_traced(_run(dense, values, images[:1]), _run(reference, values, images[:1]), plan.name)
        cells = _random_order(images, site.grid, random)
        permutation = relative_error(_run(free, values, images, _indices(cells, site.prefix)), expected)
        if not permutation <= tolerance:
            raise VerifyError(
                f"permutation: with all tokens kept {where}, in random order, the output is off by {permutation:.1e} "
                f"(relative; {tolerance:.0e} is allowed). The blocks use a token's place beyond its embedding: a rotary table, "
                "a relative-position bias, a window, a mask, or a head that picks tokens by index"
            )
        control = _control(free, values, images[:1], cells[:1], site, _first(expected))
        if not control > max(tolerance / 10, 10 * permutation):
            raise VerifyError(
                f"negative control: with one token replaced {where}, the output moves by {control:.1e} only, beside an "
                f"error of {permutation:.1e}, so the proof would not see a fault. Pass verify=False if the model is right to "
                "ignore single tokens"
            )
        _check_geometry(root, plan.dense_graph(False), site, values, images[:1], random)
        some = _indices(cells[:, : max(1, 2 * cells.shape[1] // 3)], site.prefix)
        fewer = _run(free, values, images[:1], some[:1])
        order = relative_error(_run(free, values, images[:1], _reordered(some[:1], site.prefix)), fewer)
        if not order <= tolerance:
            raise VerifyError(
                f"lengths: with fewer tokens {where}, the output depends on their order ({order:.1e}, {tolerance:.0e} is "
                "allowed): positions are rebuilt from the number of tokens"
            )
        if gm.plan.dense[True] is not gm.plan.dense[False] and not isinstance(gm.plan.dense[True], str):
            _check_training(model, gm, values, images, cells)
    return Proof(permutation, order, control, tolerance)


def redraw(model: nn.Module, random: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters at unit scale, by qualified name, and buffers as they are, all in `dtype`.

    Kernels (two or more axes) keep the variance of their input; everything else, which is added or multiplied per channel
    or position (biases, scales, tables of shape (1, N, C)), is drawn from a standard normal distribution.
    """
    values: dict[str, Tensor] = {}
    drawn: dict[Tensor, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point():
            values[name] = drawn.setdefault(parameter, _unit_scale(parameter, random, dtype))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        values[name] = buffer.to(dtype, copy=True) if buffer.is_floating_point() else buffer.clone()
    return values


def _unit_scale(parameter: Tensor, random: torch.Generator, dtype: torch.dtype) -> Tensor:
    drawn = torch.randn(parameter.shape, generator=random, device=parameter.device, dtype=dtype)
    kernel = parameter.ndim >= 2 and parameter.shape[0] > 1
    return drawn.mul_(parameter[0].numel() ** -0.5) if kernel else drawn


def _run(module: nn.Module, values: dict[str, Tensor], *inputs: Tensor) -> Any:
    """Calls `module` with `values` for the tensors that it has of them, and its other tensors in the images' dtype."""
    own = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    given = {name: values.get(name, t.to(inputs[0].dtype) if t.is_floating_point() else t) for name, t in own}
    try:
        return functional_call(module, given, inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise VerifyError(
            f"the proof could not run {type(module).__name__} in {inputs[0].dtype}: {type(error).__name__}: {error}"
        ) from error


def _free_keep(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """The rewritten graph with `papr_keep` as a second input, so without the proposal."""
    keep = next(node for node in graph.nodes if node.name == "papr_keep")
    images = graph.find_nodes(op="placeholder")[0]
    with graph.inserting_after(images):
        free = graph.placeholder("keep")
    keep.replace_all_uses_with(free)
    gm = fx.GraphModule(root, graph)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _check_finite(output: object) -> None:
    if not tensors_of(output):
        raise VerifyError(f"the model returns no tensors that can be compared, but a {type(output).__name__}")
    if not all(bool(t.isfinite().all()) for t in tensors_of(output)):
        raise VerifyError("the model's output is not finite for parameters at unit scale, so nothing can be compared")


def _check_traced(actual: object, expected: object, name: str) -> None:
    pairs = zip(tensors_of(actual), tensors_of(expected), strict=True)
    if not all(torch.equal(a, e) for a, e in pairs):
        raise VerifyError(
            f"tracing: the graph of {name} differs from the model by {relative_error(actual, expected):.1e} (relative; equal "
            "bits are needed): its forward does something that depends on the batch size or on state"
        )


def _random_order(images: Tensor, grid: tuple[int, ...], random: torch.Generator) -> Tensor:
    """A permutation of the grid's cells for each image, (B, n)."""
    rows, columns = grid
    draws = torch.rand((images.shape[0], rows * columns), generator=random, device=images.device)
    return draws.argsort(dim=1)


def _indices(cells: Tensor, prefix: int) -> Tensor:
    first = torch.arange(prefix, device=cells.device).expand(cells.shape[0], prefix)
    return torch.cat([first, cells + prefix], dim=1)


def _control(
    free: nn.Module, values: dict[str, Tensor], images: Tensor, cells: Tensor, site: prune_tokens.Site, expected: Any
) -> float:
    """How far the output moves when the last cell is replaced: by the first, or dropped altogether if it is the only one."""
    wrong = cells.clone()
    wrong[:, -1] = cells[:, 0]
    if cells.shape[1] == 1:
        wrong = wrong[:, :0]
    return relative_error(_run(free, values, images, _indices(wrong, site.prefix)), expected)


def _first(output: Any) -> Any:
    """The output for the first image."""
    return pytree.tree_map_only(Tensor, lambda t: t[:1], output)


def _reordered(keep: Tensor, prefix: int) -> Tensor:
    return torch.cat([keep[:, :prefix], keep[:, prefix:].flip(1)], dim=1)


def _check_training(model: nn.Module, gm: PrunedModule, values: dict[str, Tensor], images: Tensor, cells: Tensor) -> None:
    """Compares the graph for training mode with the model whose traced code is in training mode, all other modules in eval."""
    plan = replace(gm.plan, z=0.5)
    reference = clone(model).eval()
    for name in ("", *plan.opened):
        reference.get_submodule(name).training = True
    root = clone(shell(gm)).eval()
    site = prune_tokens.find_site(plan.dense_graph(True), plan.blocks)
    keep = _indices(cells, site.prefix)
    with torch.random.fork_rng():
        outputs: list[Any] = []
        for module, inputs in (
            (reference, (images,)),
            (reference, (images,)),
            (fx.GraphModule(root, plan.dense_graph(True)), (images,)),
            (_free_keep(root, plan.rewrite(True)), (images, keep)),
        ):
            torch.manual_seed(len(outputs) != 1)  # the second run draws other numbers: does the code draw any?
            outputs.append(_run(module, values, *inputs))
    expected, other, traced, permuted = outputs
    _check_traced(traced, expected, f"{plan.name} in training mode")
    error = relative_error(permuted, expected)
    if relative_error(other, expected) > 0:  # function dropout: it would drop other elements of permuted tokens
        return
    if not error <= _TOLERANCES[images.dtype]:
        raise VerifyError(
            f"permutation: in training mode, with all tokens kept in random order, the output is off by {error:.1e}"
        )
    _check_geometry(root, plan.dense_graph(True), site, values, images[:1], torch.Generator(images.device).manual_seed(1))


def _check_geometry(
    root: nn.Module, graph: fx.Graph, site: prune_tokens.Site, values: dict[str, Tensor], image: Tensor, random: torch.Generator
) -> None:
    """Changes single patches of an image: the token at the patch's row-major place must move most, prefix tokens not at all."""
    rows, columns = site.grid
    height, width = image.shape[-2:]
    cells = _probed_cells(rows * columns, random)
    probes = image.repeat(len(cells) + 1, 1, 1, 1)
    for probe, cell in enumerate(cells, start=1):
        i, j = divmod(cell, columns)
        top, bottom = height * i // rows, height * (i + 1) // rows
        left, right = width * j // columns, width * (j + 1) // columns
        probes[probe, :, top:bottom, left:right] *= -1
    stream = next(node for node in graph.nodes if node.name == site.stream.name)
    tokens = cast(Tensor, _run(cut(root, graph, stream), values, probes))  # (1 + cells, N, C)
    moved = (tokens[1:] - tokens[:1]).abs().sum(-1)  # (cells, N)
    if site.prefix and bool((moved[:, : site.prefix] != 0).any()):
        raise VerifyError(
            f"geometry: the first {site.prefix} of `{site.stream.name}` were taken for prefix tokens, but a patch moves them"
        )
    for cell, token in zip(cells, moved.argmax(1).tolist(), strict=True):
        if token != site.prefix + cell:
            row, column = divmod(cell, columns)
            raise VerifyError(
                f"geometry: changing patch (row {row}, column {column}) of {site.grid} moves token {token} of "
                f"`{site.stream.name}` most, not token {site.prefix + cell}: tokens are not in row-major order of this grid"
            )


def _probed_cells(count: int, random: torch.Generator) -> list[int]:
    some = torch.randint(count, (6,), generator=random, device=random.device).tolist()
    return sorted({0, count - 1, *some})
