"""Repairs code that computes with the number of tokens: sizes of tables, numberings of positions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch import fx

from ..tracing.graphs import ancestors, called
from .repairs import Count, Numbering
from .tables import Tables
from .token_run import TokenRun, is_size

# Calls that number positions, given how many there are.
NUMBERING_CALLS = (torch.arange, torch.linspace)
# Calls that pick entries of their first argument.
_PICKS = ("getitem", "index_select", "gather", "take_along_dim", "index")


class RenumberError(Exception):
    """Some calls must number the kept tokens, not all of them.

    Attributes:
        calls: Names of their nodes.
    """

    def __init__(self, calls: set[str]) -> None:
        super().__init__()
        self.calls = calls


class Counts:
    """Sizes of tables that code computes with beside sizes of the tokens, to tell other tokens from patches.

    Attributes:
        found: Those that must be the kept number.
    """

    def __init__(self, run: TokenRun, tables: Tables) -> None:
        self._run = run
        self._tables = tables
        self.found: list[Count] = []

    def repair(self, node: fx.Node) -> Any:
        """The result of `node` with the kept number for the sizes that it follows from; None if it still fails."""
        run = self._run
        counts = self._counts_for(node)
        if not counts:
            return None
        before = dict(run.env)
        self._recompute(node, counts)
        out = self._tables.repair(node)
        if out is None:
            run.env = before
        else:
            self.found += counts
        return out

    def _counts_for(self, node: fx.Node) -> list[Count]:
        """Sizes as in the dense graph that `node` reads, or that other sizes it reads were computed from."""
        run = self._run
        lengths = {dense: span for span, (dense, _) in run.lengths.items()}
        found: list[Count] = []
        seen = [node]
        for reader in seen:
            for n in reader.all_input_nodes:
                if n in seen or not is_size(run.env[n]):
                    continue
                if not run.is_dense(n):
                    seen.append(n)
                elif run.env[n] in lengths:
                    found.append(Count(n.name, lengths[run.env[n]]))
        return list(dict.fromkeys(found))

    def _recompute(self, node: fx.Node, counts: Sequence[Count]) -> None:
        """Puts the kept number in the place of `counts`, and computes again the sizes between them and `node`."""
        run = self._run
        changed = {count.size: run.lengths[count.span][1] for count in counts}
        nodes = list(node.graph.nodes)
        for n in nodes[: nodes.index(node)]:
            if n.name in changed:
                run.env[n] = changed[n.name]
            elif is_size(run.env.get(n)) and any(m.name in changed for m in n.all_input_nodes):
                run.env[n] = changed[n.name] = run.plain(n)


class Numberings:
    """Calls in blocks that number the positions, such as `torch.arange(x.shape[1])`.

    They number all tokens, so that the kept ones can be gathered. Where the numbers pick among kept tokens, they number those.

    Attributes:
        found: Calls that must get the dense number of tokens.
    """

    def __init__(self, run: TokenRun, tables: Tables, renumbered: Collection[str]) -> None:
        self._run = run
        self._tables = tables
        self._renumbered = renumbered
        self.found: list[Numbering] = []

    def applies(self, node: fx.Node) -> bool:
        """Whether `node` is such a call."""
        return node.target in NUMBERING_CALLS and node.name not in self._renumbered and self._run.in_block(node)

    def run(self, node: fx.Node) -> Any:
        """The result of such a call for the dense number of tokens."""
        run = self._run
        dense = {count: span for span, (count, _) in run.lengths.items()}
        sizes = [n for n in node.all_input_nodes if is_size(run.env[n]) and not run.is_dense(n)]
        known = {n: cast(int, n.meta.get("value")) for n in sizes if n.meta.get("value") in dense}
        before = dict(run.env)
        run.env |= known
        try:
            out = run.plain(node)
        finally:
            run.env = before
        for n, value in known.items():
            self.found.append(Numbering(node.name, n.name, dense[value]))
            self._tables.identify(n, ("dense", value))  # the same number in whichever block
        return out

    def check_index(self, node: fx.Node) -> None:
        """Raises `RenumberError` if `node` picks among kept tokens by numbers of all tokens."""
        run = self._run
        if called(node) not in _PICKS or not node.all_input_nodes or run.is_dense(node.all_input_nodes[0]):
            return
        calls = {numbering.call for numbering in self.found}
        upstream = {above.name for index in node.all_input_nodes[1:] for above in ancestors(index)}
        if not calls.isdisjoint(upstream):
            raise RenumberError(calls & upstream)
