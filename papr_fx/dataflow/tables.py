"""Repairs an operation by gathering the tables that it reads: values with an entry per position, such as rotary tables."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ..ops import gather_positions
from ..tracing.fakes import TRACED_BATCH
from ..tracing.graphs import called
from .repairs import Pick, TableSite
from .token_run import RunError, TokenRun


class Expression(NamedTuple):
    """Stands for a value. Equal for values that are computed alike from the same tensors."""

    number: int


class Tables:
    """The tables that must be gathered, found one by one.

    Attributes:
        sites: What was found, one site per table and pick. Tables that are computed alike share one.
    """

    def __init__(self, run: TokenRun) -> None:
        self._run = run
        self._numbers: dict[object, Expression] = {}
        self._expressions: dict[fx.Node, Expression] = {}
        self.sites: dict[tuple[Expression, Pick], TableSite] = {}

    def repair(self, node: fx.Node) -> Any:
        """The result of `node` with dense inputs gathered; None if it still fails."""
        run = self._run
        values = {n: run.env[n] for n in node.all_input_nodes if isinstance(run.env[n], Tensor)}
        rank = max((value.ndim for n, value in values.items() if not run.is_dense(n)), default=0)
        choices = {n: self._picks(value, rank) for n, value in values.items() if run.is_dense(n)}
        for picks in product(*choices.values()):
            chosen = {n: pick for n, pick in zip(choices, picks, strict=True) if pick}
            run.env |= {n: self._gathered(values[n], pick) for n, pick in chosen.items()}
            try:
                out = run.plain(node)
            except RunError:
                continue
            finally:
                run.env |= values
            if run.is_shorter(node, out):
                for value, pick in chosen.items():
                    self._note(value, pick, node)
                return out
        return None

    def identify(self, node: fx.Node, key: object) -> None:
        """Makes `node` stand for the same value as every other node with that key."""
        self._expressions[node] = self._numbered(key)

    def _picks(self, value: Tensor, rank: int) -> list[Pick | None]:
        """The ways to gather a value: along one or two axes of dense length, never the batch axis; or not at all."""
        lead = rank - value.ndim
        if lead < 0 or (not lead and value.shape[0] not in (1, TRACED_BATCH)):
            return [None]
        found: list[Pick | None] = [None]
        for span, (dense, _) in self._run.lengths.items():
            axes = [lead + axis for axis, size in enumerate(value.shape) if size == dense and lead + axis]
            found += [Pick(some, rank, span) for count in (1, 2) for some in combinations(axes, count)]
        return found

    def _gathered(self, value: Tensor, pick: Pick) -> Tensor:
        _, kept = self._run.lengths[pick.span]
        index = torch.zeros((TRACED_BATCH, kept), dtype=torch.int64, device=value.device)
        return gather_positions(value, index, pick.axes, pick.rank)

    def _note(self, value: fx.Node, pick: Pick, user: fx.Node) -> None:
        key = self._expression(value), pick
        site = self.sites.get(key, TableSite(value.name, pick, ()))
        self.sites[key] = replace(site, users=(*site.users, (user.name, value.name)))

    def _expression(self, node: fx.Node) -> Expression:
        if node not in self._expressions:
            pure = node.op == "get_attr" or (node.op in ("call_function", "call_method") and not _is_impure(node))
            arguments = fx.map_arg((node.args, node.kwargs), self._expression) if pure else ()
            self._expressions[node] = self._numbered((node.op, node.target, repr(arguments)) if pure else node)
        return self._expressions[node]

    def _numbered(self, key: object) -> Expression:
        return self._numbers.setdefault(key, Expression(len(self._numbers)))


def _is_impure(node: fx.Node) -> bool:
    """Whether a call may return something else the next time: it changes its receiver, or draws random numbers."""
    return called(node).endswith("_") or "random" in node.meta
