"""Repairs code that computes with the number of tokens: sizes of tables, numberings of positions, reshapes to the grid."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, fx

from ..errors import NoSiteError
from ..tracing.blocks import block_of
from ..tracing.graphs import ancestors, called, shape_of
from ..versions import TorchDispatchMode
from .repairs import Count, Numbering, View
from .tables import Tables
from .token_run import TokenRun, is_size

# Calls that number positions, given how many there are.
NUMBERING_CALLS = (torch.arange, torch.linspace)
# ATen operations on windows of neighbours, by the start of their names.
_ON_WINDOWS = ("conv", "avg_pool", "max_pool", "upsample", "grid_sampler", "im2col", "reflection_pad", "replication_pad")
# Calls that pick entries of their first argument.
_PICKS = ("getitem", "index_select", "gather", "take_along_dim", "index")


class MixingError(NoSiteError):
    """What follows the blocks needs all tokens in their places."""


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


class Views:
    """Reshapes after the blocks that lay the tokens out as their grid, (B, h, w, C).

    The kept ones become a grid of k rows and one column, so that position-wise operations and pooling over all still run.

    Attributes:
        found: The reshapes.
        later: The reshapes and what is computed from them.
    """

    def __init__(self, run: TokenRun) -> None:
        self._run = run
        self.found: list[View] = []
        self.later: set[fx.Node] = set()

    def follow(self, node: fx.Node, run: Callable[[], Any]) -> Any:
        """The result of `run`, which runs `node`.

        Raises:
            MixingError: `node` mixes neighbours on a grid that was laid out: in one column, others are neighbours.
        """
        if self.later.isdisjoint(node.all_input_nodes):
            return run()
        self.later.add(node)
        with _WatchNeighbours() as watched:
            out = run()
        if watched.mixing:
            name = node.target if node.op == "call_module" else node.name
            view = self.found[-1].user
            raise MixingError(
                f"tokens cannot be dropped: `{name}` mixes neighbours ({watched.mixing}) on the grid that `{view}` makes of "
                "them"
            )
        return out

    def repair(self, node: fx.Node) -> Tensor | None:
        """What the reshape `node` makes of the kept patches; None if it is no such reshape."""
        if called(node) not in ("reshape", "view") or block_of(node, self._run.stream.blocks):
            return None
        for place in range(len(view_sizes(node)) - 1):
            out = self._viewed(node, place)
            if out is not None:
                self.found.append(View(node.name, place, len(self._run.stream.rows.grid)))
                self.later.add(node)
                return out
        return None

    def _viewed(self, node: fx.Node, place: int) -> Tensor | None:
        """The kept patches as a grid of one column, if the sizes from `place` on are those of the grid."""
        run = self._run
        grid = run.stream.rows.grid
        _, kept = run.lengths[run.stream.rows.spans[-1]]
        sizes = [run.env[size] if isinstance(size, fx.Node) else size for size in view_sizes(node)]
        dense = shape_of(node)
        end = place + len(grid)
        if dense is None or tuple(sizes[place:end]) != grid:
            return None
        sizes[place:end] = column = [kept, *[1] * (len(grid) - 1)]
        try:
            out = run.env[node.all_input_nodes[0]].reshape(sizes)
        except RuntimeError:
            return None
        return out if tuple(out.shape) == (*dense[:place], *column, *dense[end:]) else None


class _WatchNeighbours(TorchDispatchMode):
    """Notes an operation on windows of several positions.

    Attributes:
        mixing: Its name; empty if there is none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mixing = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket).removeprefix("aten.")
        pointwise = name.startswith("conv") and prod(args[1].shape[2:]) == 1
        if name.startswith(_ON_WINDOWS) and not pointwise:
            self.mixing = name
        return func(*args, **(kwargs or {}))


def view_sizes(node: fx.Node) -> list[Any]:
    """The sizes that a reshape gets."""
    sizes = list(node.args[1:])
    return list(cast("Sequence[Any]", sizes[0])) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
