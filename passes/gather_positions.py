"""Gathers position-indexed values where they meet the pruned tokens: rotary tables, relative-position biases, masks.

Before:
    table  = rope(...)                                 # (n, D), one row for each patch
    turned = queries * table                           # (B, H, n, D)

Becomes:
    papr_patches    = kept_patches(papr_keep, prefix)  # (B, k): the kept tokens, counted without the prefix
    papr_position_0 = gather_positions(table, papr_patches, [2], 4)  # (B, 1, k, D)
    turned          = queries * papr_position_0        # (B, H, k, D)

Because: with k tokens the operation fails, as its operands differ in length. The one that does not come from the tokens holds
something for every position, so it is picked by the same indices as the tokens. A value that several blocks compute alike is
gathered once. That the right axis was picked is proved later, on numbers: all positions in random order must give
the model's output.

Where a block numbers positions by how many tokens it is given (`torch.arange(x.shape[1])`), it is given the dense number, so
that the kept ones can be picked. Where it asks a table how many positions there are, to tell prefix tokens from patches, it is
answered the kept number.
Where the tokens are laid out as their grid again behind the blocks, (B, h, w, C), the kept ones become a grid of k rows and
one column, so that what treats every position alike, such as pooling, goes on.

Left alone:
    1. A module that fails, or numbers positions itself: it is to be traced through first (`LengthError`).
    2. An operation that fails though no operand has the dense length: a window, a reshape to the grid within a block.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ..dataflow.positions import called
from ..errors import NoSiteError
from ..ops.positions import gather_positions, kept_patches
from ..tracing.fakes import MODEL_ERRORS, TRACED_BATCH, fake_like, faking
from ..tracing.graphs import ancestors, shape_of
from . import prune_tokens

# What numbers positions, given how many there are.
_NUMBERINGS = (torch.arange, torch.linspace)
# What picks entries of its first argument.
_PICKS = ("getitem", "index_select", "gather", "take_along_dim", "index")


class Pick(NamedTuple):
    """How a value is gathered: its axes that count positions, once it has `rank` axes.

    Attributes:
        axes: They stand at these places.
        rank: Number of axes of what the value meets; it gets leading ones.
        patches: Whether they count patches alone, not prefix tokens.
    """

    axes: tuple[int, ...]
    rank: int
    patches: bool


@dataclass(frozen=True)
class Site:
    """A position-indexed value that meets the tokens. Nodes are named, so that a site holds for copies of its graph.

    Attributes:
        value: The value.
        pick: How it is gathered.
        users: The operations that read it, or read a value computed alike, with the name of what each reads.
    """

    value: str
    pick: Pick
    users: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class View:
    """Where the tokens are laid out as their grid.

    Attributes:
        user: The operation.
        place: Where the first of the grid's sizes stands among those that it is given.
        axes: How many there are.
    """

    user: str
    place: int
    axes: int


@dataclass(frozen=True)
class Count:
    """A size of a position-indexed value that is reckoned with beside sizes of the tokens.

    Attributes:
        size: The node.
        patches: Whether it counts patches alone, not prefix tokens.
    """

    size: str
    patches: bool


@dataclass(frozen=True)
class Numbering:
    """A call that numbers the positions from first to last.

    Attributes:
        call: The node.
        size: The node of the tokens' number that it is given.
        patches: Whether that counts patches alone, not prefix tokens.
    """

    call: str
    size: str
    patches: bool


class Found(NamedTuple):
    """What must change for the rest of a graph to run on fewer tokens."""

    sites: tuple[Site, ...] = ()
    views: tuple[View, ...] = ()
    counts: tuple[Count, ...] = ()
    numberings: tuple[Numbering, ...] = ()


class LengthError(Exception):
    """A module refused fewer tokens, or numbers them itself; traced through, the operation in it can be found.

    Attributes:
        module: Its qualified name.
    """

    def __init__(self, module: str, reason: str) -> None:
        super().__init__(reason)
        self.module = module


def find_sites(root: nn.Module, graph: fx.Graph, tokens: prune_tokens.Site, blocks: Collection[str], images: Tensor) -> Found:
    """Runs a dense graph on fake tensors, some tokens left out, and notes what must be gathered for it to run.

    Args:
        root: A sandbox of the modules that the graph calls.
        graph: A traced graph whose nodes carry `shape` in `meta`.
        tokens: Where tokens are dropped in it.
        blocks: Qualified names of the blocks.
        images: Of the traced shape.

    Raises:
        LengthError: A module refuses fewer tokens, or numbers them.
        NoSiteError: An operation does, and no gather mends it.
    """
    kept = _other_count(prod(tokens.grid), tokens.prefix)
    if not kept:
        return Found()
    mode, fake = fake_like(images, TRACED_BATCH)
    short: set[str] = set()
    while True:
        run = _ShorterRun(root, graph, tokens, kept, blocks, short)
        try:
            with faking(mode):
                run.run(fake)
            break
        except _IndexError as index:
            short |= index.calls
    return Found(tuple(run.sites.values()), tuple(run.views), tuple(run.counts), tuple(run.numberings))


def rewrite(graph: fx.Graph, found: Found, stream: fx.Node, keep: fx.Node, prefix: int) -> None:
    """Inserts the gathers behind `keep`, one for each site however many users it has, and mends views, counts and numberings.

    `stream` holds the tokens of the dense graph.
    """
    nodes = {node.name: node for node in graph.nodes}
    patches = keep
    if prefix and (found.views or any(count.patches for count in (*found.counts, *(site.pick for site in found.sites)))):
        with graph.inserting_after(keep):
            patches = graph.create_node("call_function", kept_patches, (keep, prefix), name="papr_patches")
    for number, site in enumerate(found.sites):
        users = [(nodes[user], nodes[value]) for user, value in site.users]
        arguments = (nodes[site.value], patches if site.pick.patches else keep, list(site.pick.axes), site.pick.rank)
        with graph.inserting_before(users[0][0]):
            gathered = graph.create_node("call_function", gather_positions, arguments, name=f"papr_position_{number}")
        for user, read in users:
            user.replace_input_with(read, gathered)
    for number, view in enumerate(found.views):
        with graph.inserting_before(nodes[view.user]):
            count = graph.create_node("call_method", "size", (patches, 1), name=f"papr_rows_{number}")
        _resize(nodes[view.user], view.place, (count, *[1] * (view.axes - 1)))
    for flag in dict.fromkeys(count.patches for count in found.counts):
        counted = patches if flag else keep
        with graph.inserting_after(counted):
            name = "papr_patch_count" if flag else "papr_token_count"
            size = graph.create_node("call_method", "size", (counted, 1), name=name)
        for count in found.counts:
            if count.patches == flag:
                nodes[count.size].replace_all_uses_with(size)
    if found.numberings:
        with graph.inserting_before(keep):
            dense = {False: graph.create_node("call_method", "size", (stream, 1), name=prune_tokens.DENSE_COUNT)}
            if any(numbering.patches for numbering in found.numberings):
                dense[True] = graph.create_node(
                    "call_function", operator.sub, (dense[False], prefix), name="papr_dense_patches"
                )
        for numbering in found.numberings:
            nodes[numbering.call].replace_input_with(nodes[numbering.size], dense[numbering.patches])


def _sizes(node: fx.Node) -> list[Any]:
    """The sizes that a reshape is given."""
    sizes = list(node.args[1:])
    return list(cast("Sequence[Any]", sizes[0])) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes


def _resize(node: fx.Node, place: int, grid: tuple[Any, ...]) -> None:
    sizes = _sizes(node)
    sizes[place : place + len(grid)] = grid
    node.args = (node.args[0], tuple(sizes))


class _ShorterRun(fx.Interpreter):
    """Runs a graph with fewer tokens; where an operation fails, tries to gather what it reads beside them."""

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        tokens: prune_tokens.Site,
        kept: int,
        blocks: Collection[str],
        short: Collection[str],
    ) -> None:
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self.extra_traceback = False  # errors are reasons here, and name the node themselves
        self._stream = tokens.stream
        self._grid = tokens.grid
        self._blocks = blocks
        self._short = short
        self._sizes = {False: prod(tokens.grid) + tokens.prefix, True: prod(tokens.grid)}
        self._kept = {False: kept + tokens.prefix, True: kept}
        self._expressions: dict[object, int] = {}
        self._numbers: dict[fx.Node, int] = {}
        self.sites: dict[tuple[int, Pick], Site] = {}
        self.views: list[View] = []
        self.counts: list[Count] = []
        self.numberings: list[Numbering] = []

    def run_node(self, n: fx.Node) -> Any:
        try:
            self._check_index(n)
            with _RecordNumberings() as numbered:
                out = self._numbered(n) if self._may_number(n) else super().run_node(n)
        except _IndexError:
            raise
        except Exception as error:  # whatever a module or an operation raises for a length that it was not made for
            out = self._mended(n, error)
        else:
            if not self._is_shorter(n, out) and (view := self._view(n)) is not None:  # a size of -1 may have stretched
                out = view
        suspect = n.op == "call_module" and self._in_block(n) and not numbered.counts.isdisjoint(self._kept.values())
        if suspect and self._follows_length(n, numbered):
            raise LengthError(str(n.target), f"`{n.target}` numbers the tokens that it is given")
        return out[:, : self._kept[False]] if n is self._stream else out

    def _in_block(self, node: fx.Node) -> bool:
        """Whether a node runs in a block. What numbers tokens elsewhere, such as a head, may reckon with their count too."""
        return prune_tokens.block_of(node, self._blocks) is not None or node.target in self._blocks

    def _may_number(self, node: fx.Node) -> bool:
        return node.target in _NUMBERINGS and node.name not in self._short and self._in_block(node)

    def _check_index(self, node: fx.Node) -> None:
        """Finds numbers of all tokens that pick among the kept ones: there, these are to be numbered."""
        if called(node) not in _PICKS or not node.all_input_nodes or self._is_dense(node.all_input_nodes[0]):
            return
        calls = {numbering.call for numbering in self.numberings}
        behind = {above.name for index in node.all_input_nodes[1:] for above in ancestors(index)}
        if not calls.isdisjoint(behind):
            raise _IndexError(calls & behind)

    def _numbered(self, node: fx.Node) -> Any:
        """What numbers the tokens, given the dense number of them."""
        sizes = [n for n in node.all_input_nodes if _is_size(self.env[n]) and not self._is_dense(n)]
        known = {n: cast(int, n.meta.get("value")) for n in sizes if n.meta.get("value") in self._sizes.values()}
        before = dict(self.env)
        self.env |= known
        try:
            out = super().run_node(node)
        finally:
            self.env = before
        for n, value in known.items():
            self.numberings.append(Numbering(node.name, n.name, value != self._sizes[False]))
            self._numbers[n] = self._expressions.setdefault(("dense", value), len(self._expressions))  # whichever block asks
        return out

    def _follows_length(self, node: fx.Node, shorter: _RecordNumberings) -> bool:
        """Whether a module numbers more with all tokens."""
        before = dict(self.env)
        for n in node.all_input_nodes:
            value, shape = self.env[n], shape_of(n)
            if isinstance(value, Tensor) and shape is not None:
                self.env[n] = value.new_empty(shape)
            elif _is_size(value):
                self.env[n] = n.meta.get("value", value)
        try:
            with _RecordNumberings() as whole:
                super().run_node(node)
        except MODEL_ERRORS:
            return True
        finally:
            self.env = before
        return whole.counts != shorter.counts

    def _mended(self, node: fx.Node, error: Exception) -> Any:
        inputs = ", ".join(f"{n.name} {_shape(self.env[n])}" for n in node.all_input_nodes)
        name = node.target if node.op == "call_module" else node.name
        reason = f"`{name}` refused {inputs}: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if node.op == "call_module":
            raise LengthError(str(node.target), reason) from error
        out = self._retried(node)
        if out is None and (counts := self._counts_for(node)):
            env = dict(self.env)
            self._count_anew(node, counts)
            out = self._retried(node)
            if out is None:
                self.env = env
            else:
                self.counts += counts
        if out is None:
            out = self._view(node)
        if out is None:
            raise NoSiteError(reason) from error
        return out

    def _retried(self, node: fx.Node) -> Any:
        """The result with whatever it takes gathered; None if it still fails."""
        values = {n: self.env[n] for n in node.all_input_nodes if isinstance(self.env[n], Tensor)}
        rank = max((value.ndim for n, value in values.items() if not self._is_dense(n)), default=0)
        fixed = {n: self._picks(value, rank) for n, value in values.items() if self._is_dense(n)}
        for picks in product(*fixed.values()):
            chosen = {n: pick for n, pick in zip(fixed, picks, strict=True) if pick}
            self.env |= {n: self._gathered(values[n], pick) for n, pick in chosen.items()}
            try:
                out = super().run_node(node)
            except MODEL_ERRORS:
                continue
            finally:
                self.env |= values
            if self._is_shorter(node, out):
                for value, pick in chosen.items():
                    self._note(value, pick, node)
                return out
        return None

    def _is_dense(self, node: fx.Node) -> bool:
        """Whether a value, a tensor or a number, is as long as in the dense graph."""
        value = self.env[node]
        return tuple(value.shape) == shape_of(node) if isinstance(value, Tensor) else value == node.meta.get("value")

    def _counts_for(self, node: fx.Node) -> list[Count]:
        """Sizes as in the dense graph that `node` reads, or that are reckoned with for it, though tokens were left out."""
        found: list[Count] = []
        seen = [node]
        for reader in seen:
            for n in reader.all_input_nodes:
                if n in seen or not _is_size(self.env[n]):
                    continue
                if not self._is_dense(n):
                    seen.append(n)
                elif self.env[n] in self._sizes.values():
                    found.append(Count(n.name, self.env[n] == self._sizes[True]))
        return list(dict.fromkeys(found))

    def _count_anew(self, node: fx.Node, counts: list[Count]) -> None:
        """Puts the kept number for each of `counts`, and what is reckoned from them in front of `node`."""
        changed = {count.size: self._kept[count.patches] for count in counts}
        nodes = list(self.graph.nodes)
        for n in nodes[: nodes.index(node)]:
            if n.name in changed:
                self.env[n] = changed[n.name]
            elif _is_size(self.env.get(n)) and any(m.name in changed for m in n.all_input_nodes):
                self.env[n] = changed[n.name] = super().run_node(n)

    def _view(self, node: fx.Node) -> Tensor | None:
        """What a reshape to the grid behind the blocks makes of the kept patches; None if this is none."""
        if called(node) in ("reshape", "view") and not prune_tokens.block_of(node, self._blocks):
            for place in range(len(_sizes(node)) - 1):
                out = self._viewed(node, place)
                if out is not None:
                    self.views.append(View(node.name, place, len(self._grid)))
                    return out
        return None

    def _viewed(self, node: fx.Node, place: int) -> Tensor | None:
        """The kept patches as a grid of one column, if the sizes at `place` are those of the grid and this is their layout."""
        known = [self.env[size] if isinstance(size, fx.Node) else size for size in _sizes(node)]
        dense = shape_of(node)
        end = place + len(self._grid)
        if dense is None or tuple(known[place:end]) != self._grid:
            return None
        known[place:end] = kept = [self._kept[True], *[1] * (len(self._grid) - 1)]
        try:
            out = self.env[node.all_input_nodes[0]].reshape(known)
        except RuntimeError:
            return None
        expected = (*dense[:place], *kept, *dense[end:])
        return out if tuple(out.shape) == expected else None

    def _picks(self, value: Tensor, rank: int) -> list[Pick | None]:
        """The ways to gather a value: along one or more axes of the dense length, never the batch axis; or not at all."""
        lead = rank - value.ndim
        if lead < 0 or (not lead and value.shape[0] not in (1, TRACED_BATCH)):
            return [None]
        found: list[Pick | None] = [None]
        for patches in dict.fromkeys((False, self._sizes[True] != self._sizes[False])):
            axes = [lead + axis for axis, size in enumerate(value.shape) if size == self._sizes[patches] and lead + axis]
            found += [Pick(some, rank, patches) for count in (1, 2) for some in combinations(axes, count)]
        return found

    def _gathered(self, value: Tensor, pick: Pick) -> Tensor:
        index = torch.zeros((TRACED_BATCH, self._kept[pick.patches]), dtype=torch.int64, device=value.device)
        return gather_positions(value, index, pick.axes, pick.rank)

    def _is_shorter(self, node: fx.Node, out: Any) -> bool:
        """Whether a result has the dense shape but for the number of positions."""
        dense = shape_of(node)
        if dense is None or not isinstance(out, Tensor) or len(dense) != out.ndim:
            return dense is None
        lengths = {(self._sizes[patches], self._kept[patches]) for patches in (False, True)}
        return all(size == before or (before, size) in lengths for before, size in zip(dense, out.shape, strict=True))

    def _note(self, value: fx.Node, pick: Pick, user: fx.Node) -> None:
        key = self._number(value), pick
        site = self.sites.get(key, Site(value.name, pick, ()))
        self.sites[key] = replace(site, users=(*site.users, (user.name, value.name)))

    def _number(self, node: fx.Node) -> int:
        """Equal for values that are computed alike from the same tensors."""
        if node not in self._numbers:
            pure = node.op == "get_attr" or (node.op in ("call_function", "call_method") and not _is_impure(node))
            arguments = fx.map_arg((node.args, node.kwargs), self._number) if pure else ()
            expression = (node.op, node.target, repr(arguments)) if pure else node
            self._numbers[node] = self._expressions.setdefault(expression, len(self._expressions))
        return self._numbers[node]


class _IndexError(Exception):
    """Some calls are to number the kept tokens."""

    def __init__(self, calls: set[str]) -> None:
        super().__init__()
        self.calls = calls


class _RecordNumberings(TorchFunctionMode):
    """Notes the whole numbers that calls such as `torch.arange` are given."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _NUMBERINGS:
            self.counts.update(value for value in (*args, *(kwargs or {}).values()) if _is_size(value))
        return func(*args, **(kwargs or {}))


def _is_impure(node: fx.Node) -> bool:
    """Whether a call may give something else the next time: it changes its receiver, or draws random numbers."""
    return called(node).endswith("_") or "rand" in called(node) or called(node) in ("dropout", "bernoulli", "multinomial")


def _other_count(patches: int, prefix: int) -> int:
    """A number of patches that no operation confuses with all of them, nor stretches; 0 if there is none."""
    dense = {patches, patches + prefix}
    some = 2 * patches // 3
    return next((k for k in (*range(some, 1, -1), *range(some + 1, patches)) if dense.isdisjoint((k, k + prefix))), 0)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else value
