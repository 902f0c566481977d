"""The proof of a rewrite: on the model itself, with parameters that cannot hide a fault.

A rewritten graph whose choice of positions is free (an input) is compared with the model. Parameters are redrawn at unit
scale first: trained or fresh ones may be so small (layer scales of 1e-6, bias tables of zeros) that a wrong rewrite passes.

1. Tracing: the dense graph gives the model's output to the bit.
2. Permutation: given all positions in random order, the rewritten graph gives the model's output.
3. Negative control: with one position replaced by another, it does not. Else the proof sees nothing.
4. Geometry: changing one patch of the image moves the position that the map scores for it, and no prefix token.
5. Lengths: with some positions only, the output does not depend on their order.
6. Regions, for pixel operators: with some positions only, the output is that of the dense graph with masked branches.
7. Hidden keys, for tokens: with some tokens only, they are those of the dense graph in which no attention sees the others.
8. Merging, where tokens are merged: see `verify_reduction`. The other parts are about the graph without it.

A model whose code differs in training mode has a second graph: it is compared with the model in that mode, dropout off.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..dataflow.moves import residual_of
from ..dataflow.positions import Layout
from ..errors import SiteError, VerifyError
from ..passes import prune_tokens
from ..passes.prune_pixels import mask_branches
from ..planning.module import PrunedModule, shell
from ..planning.plan import Choice, Pixels, Plan, Tokens
from ..tracing.fakes import aliased_copy
from ..tracing.graphs import cut, shape_of
from ..tracing.numerics import exact_float32, redraw, relative_error, tensors_of
from .case import TOLERANCES, ComparisonError, PrecisionError, run
from .hidden_keys import HiddenKeys
from .places import Place, find_place, reorder
from .reduction import prove_reduction

# Not the batch size that was traced: a frozen one shows.
_BATCH = 3


class Proof(NamedTuple):
    """Relative errors found: those that had to be small, and the control that had to be large."""

    permutation: float
    order: float
    control: float
    tolerance: float


def prove(model: nn.Module, gm: PrunedModule) -> Proof:
    """Proves that `gm` is `model` on fewer positions; both are left as they are.

    It runs in float32; where a comparison fails there, in float64, whose noise is far below what a wrong position does.

    Args:
        model: The model that was transformed.
        gm: The result.

    Raises:
        VerifyError: A part of the proof fails; the message names the part, the site and the error.
    """
    example = gm.example()
    if example.dtype == torch.float64:
        return _prove(model, gm, torch.float64)
    try:
        return _prove(model, gm, torch.float32)
    except ComparisonError as error:
        if example.device.type == "mps":  # it has no float64
            raise
        try:
            return _prove(model, gm, torch.float64)
        except PrecisionError:
            raise error from None


@torch.no_grad()
def _prove(model: nn.Module, gm: PrunedModule, dtype: torch.dtype) -> Proof:
    plan = replace(gm.plan.pruning, z=0.5)
    example = gm.example()
    random = torch.Generator(example.device).manual_seed(0)
    images = torch.randn((_BATCH, *example.shape[1:]), generator=random, device=example.device, dtype=dtype)
    values = redraw(model, random, dtype)
    choices = plan.choices(False)
    root = aliased_copy(shell(gm)).eval()
    dense = fx.GraphModule(root, plan.dense_graph(False))
    free = _free_keep(root, plan.rewrite(False), choices)
    tolerance = TOLERANCES[dtype]

    with exact_float32():
        reference = aliased_copy(model).eval()
        expected = run(reference, values, images)
        _check_finite(expected)
        _check_traced(run(dense, values, images), expected, plan.name)
        _check_traced(run(dense, values, images[:1]), run(reference, values, images[:1]), plan.name)
        orders = [_random_order(images, choice.grid, random) for choice in choices]
        some = [cells[:1, : max(1, 2 * cells.shape[1] // 3)] for cells in orders]
        fewer = run(free, values, images[:1], *_indices(some, choices))
        places = _places(plan, choices, _first(expected), fewer, some)
        permuted = reorder(expected, places, orders[0])
        permutation = relative_error(run(free, values, images, *_indices(orders, choices)), permuted)
        if not permutation <= tolerance:
            raise ComparisonError(
                f"permutation: with all positions kept {choices[0].where}, in random order, the output is off by "
                f"{permutation:.1e} (relative; {tolerance:.0e} is allowed). What follows uses a position's place beyond its "
                "embedding: a rotary table, a relative-position bias, a window, a mask, or a head that picks tokens by index"
            )
        controls = [
            _control(free, values, images[:1], orders, choices, place, _first(permuted)) for place in range(len(choices))
        ]
        # One of a stage's thousands of positions moves the output less than one token: there, noise is the floor.
        floor = tolerance / 10 if isinstance(plan.operator, Tokens) else 40 * torch.finfo(dtype).eps
        for choice, control in zip(choices, controls, strict=True):
            if control is not None and not control > max(floor, 10 * permutation):
                raise ComparisonError(
                    f"negative control: with one position replaced {choice.where}, the output moves by {control:.1e} only, "
                    f"beside an error of {permutation:.1e}, so the proof would not see a fault. Pass verify=False if the model "
                    "is right to ignore single positions",
                    _merges(plan, choice.grid),
                )
        seen = [control for control in controls if control is not None]
        allowed = min(tolerance, *seen)  # one wrong position is to show
        _check_geometry(model, root, plan, False, values, images[:1], random)
        flipped = run(free, values, images[:1], *_indices([cells.flip(1) for cells in some], choices))
        backwards = torch.arange(some[0].shape[1], device=images.device).flip(0).unsqueeze(0)
        order = relative_error(flipped, reorder(fewer, places, backwards))
        if not order <= allowed:
            raise ComparisonError(
                f"lengths: with fewer positions {choices[0].where}, the output depends on their order ({order:.1e}, "
                f"{allowed:.0e} is allowed): places are rebuilt from the number of positions"
            )
        if isinstance(plan.operator, Pixels):
            _check_masked(root, plan, plan.operator, values, images[:1], some, allowed, fewer)
        else:
            _check_hidden(
                root, plan, plan.operator, choices[0], free, values, images[:1], _indices(some, choices)[0], tolerance
            )
        prove_reduction(root, gm.plan, values, images, training=False)
        if not gm.plan.one_graph and not isinstance(gm.plan.dense[True], str):
            _check_training(model, gm, values, images, places, random)
    return Proof(permutation, order, min(seen, default=tolerance), tolerance)


def _free_keep(root: nn.Module, graph: fx.Graph, choices: Sequence[Choice]) -> fx.GraphModule:
    """The rewritten graph with the chosen positions as further inputs, so without the proposal."""
    nodes = {node.name: node for node in graph.nodes}
    last = graph.find_nodes(op="placeholder")[0]
    for choice in choices:
        with graph.inserting_after(last):
            last = graph.placeholder(f"keep{choice.suffix}")
        nodes[f"papr_keep{choice.suffix}"].replace_all_uses_with(last)
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
    if len(tensors_of(actual)) != len(tensors_of(expected)):
        raise VerifyError(
            f"tracing: the graph of {name} returns {len(tensors_of(actual))} tensors where the model returns "
            f"{len(tensors_of(expected))}"
        )
    pairs = zip(tensors_of(actual), tensors_of(expected), strict=True)
    if not all(torch.equal(a, e) for a, e in pairs):
        raise PrecisionError(
            f"tracing: the graph of {name} differs from the model by {relative_error(actual, expected):.1e} (relative; equal "
            "bits are needed): its forward does something that depends on the batch size or on state"
        )


def _random_order(images: Tensor, grid: tuple[int, ...], random: torch.Generator) -> Tensor:
    """A permutation of the grid's cells for each image, (B, n)."""
    draws = torch.rand((images.shape[0], prod(grid)), generator=random, device=images.device)
    return draws.argsort(dim=1)


def _indices(orders: Sequence[Tensor], choices: Sequence[Choice]) -> list[Tensor]:
    """Cells (B, k) of each grid as indices (B, prefix + k)."""
    indices: list[Tensor] = []
    for cells, choice in zip(orders, choices, strict=True):
        first = torch.arange(choice.prefix, device=cells.device).expand(cells.shape[0], choice.prefix)
        indices.append(torch.cat([first, cells + choice.prefix], dim=1))
    return indices


def _control(
    free: nn.Module,
    values: dict[str, Tensor],
    images: Tensor,
    orders: Sequence[Tensor],
    choices: Sequence[Choice],
    place: int,
    expected: Any,
) -> float | None:
    """How far the output moves when a grid's last cell is replaced: by the first, or dropped if it is the only token.

    None for a grid of one position, without which a convolution would not run.
    """
    if orders[place].shape[1] == 1 and choices[place].layout != "BNC":
        return None
    wrong = [cells[:1].clone() for cells in orders]
    wrong[place][:, -1] = wrong[place][:, 0]
    if wrong[place].shape[1] == 1:
        wrong[place] = wrong[place][:, :0]
    return relative_error(run(free, values, images, *_indices(wrong, choices)), expected)


def _merges(plan: Plan, grid: tuple[int, ...]) -> tuple[str, ...]:
    """The residual additions of pixel operators on a grid."""
    sites = plan.operator.sites[False] if isinstance(plan.operator, Pixels) else ()
    return tuple(site.merge for site in sites if site.grid == grid)


def _places(plan: Plan, choices: Sequence[Choice], dense: Any, pruned: Any, kept: Sequence[Tensor]) -> list[Place | None]:
    """Where the output still holds a value for every token; nowhere in a model of pixel operators, whose grids stay."""
    if isinstance(plan.operator, Pixels):
        return [None] * len(tensors_of(dense))
    (choice,) = choices
    try:
        return [
            find_place(a.shape, b.shape, choice.grid, choice.prefix, kept[0].shape[1])
            for a, b in zip(tensors_of(dense), tensors_of(pruned), strict=True)
        ]
    except ValueError as error:
        raise VerifyError(f"lengths: {error} with {kept[0].shape[1]} of {choice.grid} patches kept") from error


def _first(output: Any) -> Any:
    """The output for the first image."""
    return pytree.tree_map_only(Tensor, lambda t: t[:1], output)


def _check_masked(
    root: nn.Module,
    plan: Plan,
    operator: Pixels,
    values: dict[str, Tensor],
    image: Tensor,
    kept: Sequence[Tensor],
    allowed: float,
    pruned: Any,
) -> None:
    """Compares a pruned run with the dense graph whose branches are multiplied by the mask: Eq. 4 as it stands."""
    choices = plan.choices(False)
    masks = {
        choice.grid: image.new_zeros(1, prod(choice.grid)).scatter_(1, cells, 1)
        for choice, cells in zip(choices, kept, strict=True)
    }
    graph = mask_branches(plan.dense_graph(False), operator.sites[False], operator.background)
    masked = run(fx.GraphModule(root, graph), values, image, *(masks[choice.grid] for choice in choices))
    error = relative_error(pruned, masked)
    if not error <= allowed:
        raise ComparisonError(
            f"regions: with fewer positions the output is off by {error:.1e} from the dense model with masked branches "
            f"({allowed:.0e} is allowed): an operator mixes positions"
        )


def _check_hidden(
    root: nn.Module,
    plan: Plan,
    tokens: Tokens,
    choice: Choice,
    free: fx.GraphModule,
    values: dict[str, Tensor],
    image: Tensor,
    keep: Tensor,
    tolerance: float,
) -> None:
    """Compares kept tokens with the dense graph in which the others are hidden from every attention."""
    graph = plan.dense_graph(False)
    stream = next(node for node in graph.nodes if node.name == choice.stream)
    last = prune_tokens.last_tokens(graph, stream, tokens.blocks)
    shape = cast("tuple[int, ...]", shape_of(stream))
    hidden = torch.ones((1, shape[1]), dtype=torch.bool, device=image.device).scatter(1, keep, False)
    with HiddenKeys(hidden) as attention:
        dense = cast(Tensor, run(cut(root, graph, last), values, image))
    if not attention.seen:
        raise VerifyError(
            f"hidden keys: no attention over the {shape[1]} tokens was seen behind `{choice.stream}` (neither "
            "scaled_dot_product_attention nor nn.MultiheadAttention, nor a softmax over keys). Tokens that are mixed in "
            "another way cannot be left out"
        )
    kept = next(node for node in free.graph.nodes if node.name == last.name)
    pruned = run(cut(root, free.graph, kept), values, image, keep)
    error = relative_error(pruned, dense.gather(1, keep.unsqueeze(-1).expand(-1, -1, dense.shape[-1])))
    if not error <= tolerance:
        raise ComparisonError(
            f"hidden keys: the kept tokens of `{last.name}` are off by {error:.1e} from those of the dense model in which no "
            f"attention sees the others ({tolerance:.0e} is allowed): something else mixes tokens, or normalises over them"
        )


def _check_training(
    model: nn.Module,
    gm: PrunedModule,
    values: dict[str, Tensor],
    images: Tensor,
    places: Sequence[Place | None],
    random: torch.Generator,
) -> None:
    """Compares the graph for training mode with the model whose traced code is in training mode, all other modules in eval."""
    plan = replace(gm.plan.pruning, z=0.5)
    graph = plan.dense_graph(True)
    whole = {str(node.target) for node in graph.find_nodes(op="call_module")}
    reference = aliased_copy(model).eval()
    for name, module in reference.named_modules():  # code that was traced through ran in training mode, methods too
        module.training = not any(f"{name}.".startswith(f"{called}.") for called in whole)
    root = aliased_copy(shell(gm)).eval()
    choices = plan.choices(True)
    orders = [_random_order(images, choice.grid, random) for choice in choices]
    keeps = _indices(orders, choices)
    with torch.random.fork_rng():
        outputs: list[Any] = []
        for module, inputs in (
            (reference, (images,)),
            (reference, (images,)),
            (fx.GraphModule(root, graph), (images,)),
            (_free_keep(root, plan.rewrite(True), choices), (images, *keeps)),
        ):
            torch.manual_seed(len(outputs) != 1)  # the second run draws other numbers: does the code draw any?
            outputs.append(run(module, values, *inputs))
    expected, other, traced, permuted = outputs
    _check_traced(traced, expected, f"{plan.name} in training mode")
    error = relative_error(permuted, reorder(expected, places, orders[0]))
    if relative_error(other, expected) > 0:  # function dropout: it would drop other elements of permuted tokens
        return
    if not error <= TOLERANCES[images.dtype]:
        raise ComparisonError(
            f"permutation: in training mode, with all positions kept in random order, the output is off by {error:.1e}"
        )
    _check_geometry(model, root, plan, True, values, images[:1], random)
    prove_reduction(root, gm.plan, values, images, training=True)


def _check_geometry(
    model: nn.Module,
    root: nn.Module,
    plan: Plan,
    training: bool,
    values: dict[str, Tensor],
    image: Tensor,
    random: torch.Generator,
) -> None:
    """Changes single patches of an image: the position that moves must be the one that the map scores."""
    graph = plan.dense_graph(training)
    choices = plan.choices(training)
    if isinstance(plan.operator, Tokens):
        moved, cells = _moved(root, graph, choices[0], values, image, plan.layout, random)
        return _check_tokens(choices[0], moved, cells)
    # Each branch spreads a change over the grid; the residuals alone keep it in its place.
    for node in graph.nodes:
        passed = residual_of(node)
        if passed:
            node.op, node.target, node.args = "call_function", operator.pos, (passed,)
    operators = plan.operator.sites[training]
    places = dict.fromkeys((*site.ordered, site.prefix, site.grid) for site in operators)
    wrong = {place for place in places if not _in_order(root, graph, *place, values, image, plan.layout, random)}
    if wrong:
        sites = [site for site in operators if (*site.ordered, site.prefix, site.grid) in wrong]
        where = ", ".join(f"`{stream}` on grid {grid}" for stream, *_, grid in wrong)
        raise SiteError(
            f"geometry: changing patches of the image moves other positions more than these in {where}: positions are not in "
            "row-major order of the grid there",
            tuple(site.merge for site in sites),
        )
    return None


def _in_order(
    root: nn.Module,
    graph: fx.Graph,
    stream: str,
    layout: Layout,
    prefix: int,
    grid: tuple[int, ...],
    values: dict[str, Tensor],
    image: Tensor,
    axes: str,
    random: torch.Generator,
) -> bool:
    """Whether the positions of a value move most where the image was changed."""
    moved, cells = _moved(root, graph, Choice("", grid, prefix, stream, layout, ""), values, image, axes, random)
    moved = moved[:, prefix:]
    places = torch.tensor(cells, device=moved.device).unsqueeze(1)
    lesser = (moved < moved.gather(1, places)).sum(1) / max(1, moved.shape[1] - 1)  # 1: the changed patch moves most
    return moved.shape[1] == 1 or bool(lesser.mean() > 0.9)


def _check_tokens(choice: Choice, moved: Tensor, cells: list[int]) -> None:
    if choice.prefix and bool((moved[:, : choice.prefix] != 0).any()):
        raise VerifyError(
            f"geometry: the first {choice.prefix} of `{choice.stream}` were taken for prefix tokens, but a patch moves them"
        )
    for cell, token in zip(cells, moved.argmax(1).tolist(), strict=True):
        if token != choice.prefix + cell:
            raise VerifyError(
                f"geometry: changing patch {_cell(cell, choice.grid)} of {choice.grid} moves token {token} of "
                f"`{choice.stream}` most, not token {choice.prefix + cell}: tokens are not in row-major order of this grid"
            )


def _moved(
    root: nn.Module,
    graph: fx.Graph,
    choice: Choice,
    values: dict[str, Tensor],
    image: Tensor,
    axes: str,
    random: torch.Generator,
) -> tuple[Tensor, list[int]]:
    """How far each position of the stream moves when a patch is changed, (cells, positions), and which cells were changed.

    `axes` are those of the image, by letter.
    """
    cells = _probed_cells(prod(choice.grid), random)
    probes = image.repeat(len(cells) + 1, *[1] * (image.ndim - 1))
    for probe, cell in enumerate(cells, start=1):
        patch = probes[probe : probe + 1]
        for letter, place, count in zip("THW"[-len(choice.grid) :], _cell(cell, choice.grid), choice.grid, strict=True):
            axis = axes.index(letter)
            first, end = (image.shape[axis] * edge // count for edge in (place, place + 1))
            patch = patch.narrow(axis, first, end - first)
        patch *= -1
    stream = next(node for node in graph.nodes if node.name == choice.stream)
    value = cast(Tensor, run(cut(root, graph, stream), values, probes))
    positions = value.movedim(choice.layout.index("C"), -1).flatten(1, -2)  # (1 + cells, N, C)
    return (positions[1:] - positions[:1]).abs().sum(-1), cells


def _cell(number: int, grid: Sequence[int]) -> tuple[int, ...]:
    """Where the cell of that number, counted in row-major order, stands in a grid."""
    return tuple(int(place) for place in torch.unravel_index(torch.tensor(number), grid))


def _probed_cells(count: int, random: torch.Generator) -> list[int]:
    some = torch.randint(count, (6,), generator=random, device=random.device).tolist()
    return sorted({0, count - 1, *some})
