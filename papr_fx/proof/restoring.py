"""Part 6, restoring: with fewer tokens, each place of the grid holds its own token, or the nearest one."""

from __future__ import annotations

from itertools import product
from typing import cast

import torch
from torch import Tensor, fx

from ..errors import VerifyError
from ..passes.kinds import Kind
from ..tracing.graphs import cut
from ..tracing.numerics import tensors_of
from ..tracing.roles import find_all
from .case import Case, ComparisonError


def check(case: Case) -> None:
    """Keeps two thirds of the patches: where they are put back in their places, each place is looked up by hand.

    Fault: dropped places are filled from elsewhere, or a kept token goes to another place than its own. The other parts do not
    find it: with all patches kept nothing is filled, and a wrong place is as wrong in any order of the tokens.
    Example: a fill that takes the first kept token for every dropped place: 5 of 15 places hold another token.
    Does nothing where no tokens are put back.

    Raises:
        VerifyError: A place holds another token, or all tokens are alike, so that nothing can be seen.
    """
    graph = case.rewrite.pruned_graph()
    restored = find_all(graph, Kind.RESTORED)
    if not restored:
        return
    (choice,), (cells,) = case.rewrite.choices, case.kept
    wanted = _tokens_by_hand(choice.rows.grid, cells[0], zero=case.rewrite.plan.target.restore == "zero")
    part = cut(case.root, graph, *[node for made in restored for node in (made.all_input_nodes[0], made)])
    values = tensors_of(case.run(part, case.images[:1], *case.indices(case.kept)))
    for made, value, out in zip(restored, values[::2], values[1::2], strict=True):
        _compare(made, value, out, wanted)


def _compare(made: fx.Node, value: Tensor, out: Tensor, wanted: list[int]) -> None:
    """Compares the places (n) of `out` with the tokens (k) of `value` that should be there; -1 for zeros."""
    axis = cast(int, made.args[2])
    tokens, places = (tensor.movedim(axis, 0).flatten(1) for tensor in (value, out))
    expected = torch.stack([tokens[token] if token >= 0 else torch.zeros_like(tokens[0]) for token in wanted])
    wrong = (places != expected).any(1)
    if bool(wrong.any()):
        raise VerifyError(
            f"restoring: {int(wrong.sum())} of {len(wanted)} places that `{made.next.name}` lays out hold another token than "
            "their own or the nearest kept one"
        )
    if len(tokens) > 1 and not bool((tokens[1:] != tokens[:1]).any()):
        raise ComparisonError(
            f"restoring: all tokens that `{made.next.name}` lays out are equal, so the proof would not see a wrong place"
        )


def _tokens_by_hand(grid: tuple[int, ...], cells: Tensor, *, zero: bool) -> list[int]:
    """The token at each place of a grid, where token i stands at `cells[i]`: the nearest one, or -1 where there is none."""
    places = torch.tensor(list(product(*map(range, grid))), device=cells.device)  # (n, axes)
    found: list[int] = []
    for number, place in enumerate(places):
        distances = (places[cells] - place).square().sum(1)  # (k,)
        token = int((distances * len(places) + cells).argmin())  # the first of those that are equally near
        found.append(-1 if zero and int(cells[token]) != number else token)
    return found
