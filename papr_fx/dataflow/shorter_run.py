"""Runs a dense graph on fewer tokens, on fake tensors, and finds out what must change for it to run."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ..errors import NoSiteError, first_line
from ..ops import TokenRows
from ..ops.rows import Span
from ..tracing.fakes import TRACED_BATCH, fake_like, faking
from ..tracing.graphs import called, shape_of
from ..tracing.trace import OpenError
from .layouts import Layouts, RestoreError
from .lengths import NUMBERING_CALLS, Counts, Numberings, RenumberError
from .repairs import Repairs
from .slices import other_tokens
from .tables import Tables
from .token_run import RunError, TokenRun, TokenStream, is_size


def find_repairs(root: nn.Module, stream: TokenStream, images: Tensor) -> Repairs:
    """Runs the graph of `stream` with some tokens left out.

    Args:
        root: A scratch copy of the modules that the graph calls.
        stream: The tokens. Nodes of their graph carry `shape` in `meta`.
        images: Images of the traced shape.

    Raises:
        OpenError: A module refuses fewer tokens, or numbers them itself. Traced through, its operations can be repaired.
        NoSiteError: An operation refuses fewer tokens, and nothing repairs it.
    """
    kept = _other_count(stream.rows)
    if not kept:
        return Repairs()
    mode, fake = fake_like(images, TRACED_BATCH)
    renumbered: set[str] = set()
    restored: set[str] = set()
    while True:
        run = ShorterRun(root, stream, kept, renumbered, restored)
        try:
            with faking(mode, root):
                run.run(fake)
        except RenumberError as error:
            renumbered |= error.calls
            continue
        except RestoreError as error:
            run.layouts.wrong |= error.layouts
        except NoSiteError:
            if not run.layouts.wrong:  # else it may follow from them
                raise
        if not run.layouts.wrong:
            _check_ends(stream.rows, run.repairs)
            return run.repairs
        restored |= run.layouts.wrong


class ShorterRun(TokenRun):
    """Runs a graph on fewer tokens. Where an operation fails, its inputs are repaired, and it runs again.

    Args:
        root: The modules that the graph calls.
        stream: The tokens.
        kept: How many patches are left.
        renumbered: Calls that must number the kept tokens, not all of them.
        restored: Nodes after the blocks that need the patches in their places.
    """

    def __init__(
        self, root: nn.Module, stream: TokenStream, kept: int, renumbered: Collection[str], restored: Collection[str]
    ) -> None:
        super().__init__(root, stream, kept)
        self.tables = Tables(self)
        self.counts = Counts(self, self.tables)
        self.layouts = Layouts(self, restored)
        self.numberings = Numberings(self, self.tables, renumbered)

    @property
    def repairs(self) -> Repairs:
        """What was repaired."""
        tables, layouts = tuple(self.tables.sites.values()), self.layouts
        return Repairs(
            tables, tuple(layouts.columns), tuple(self.counts.found), tuple(self.numberings.found), tuple(layouts.places)
        )

    def run_node(self, n: fx.Node) -> Any:
        """Runs a node on the values so far, and repairs it if it fails."""
        self.numberings.check_index(n)
        recorder = _RecordNumberings()
        try:
            with recorder:
                numbers = self.numberings.applies(n)
                out = self.numberings.run(n) if numbers else self.layouts.follow(n, lambda: self.plain(n))
        except RunError as failed:
            out = self._repaired(n, failed.error)
        else:
            out = out if self.is_shorter(n, out) and not other_tokens(self, n) else self._of_kept(n, out)
        kept = {kept for _, kept in self.lengths.values()}
        suspect = n.op == "call_module" and self.in_block(n) and not recorder.counts.isdisjoint(kept)
        if suspect and self._follows_length(n, recorder.counts):
            raise OpenError({str(n.target)}, f"`{n.target}` numbers its input tokens", whole_class=True)
        return out[:, : self.lengths[Span()][1]] if n is self.stream.node else out

    def _of_kept(self, node: fx.Node, out: Any) -> Any:
        """What `node` makes of the kept tokens, where its result `out` does not have their number."""
        if node.op == "call_module" and not self.in_block(node) and not self._is_of_torch(node):
            reason = f"`{node.target}` returns {_shape(out)} for fewer tokens, where it returns {shape_of(node)} for all"
            raise OpenError({str(node.target)}, reason, whole_class=True)
        if called(node) != "getitem" or not isinstance(out, Tensor):
            return out
        cut = self.counts.repair(node)  # a slice as far as the number of all tokens stops at the last kept one
        if taken := other_tokens(self, node):
            raise NoSiteError(
                f"`{node.name}` takes {taken}: of fewer tokens it would take others. Slice by the number of "
                "tokens in front of the patches and behind them (`x[:, n:-m]`), or by the token count there (`x.shape[1]`)"
            )
        return out if cut is None else cut

    def _is_of_torch(self, node: fx.Node) -> bool:
        """Whether a node calls a module of PyTorch, which is not traced through."""
        return type(self.fetch_attr(str(node.target))).__module__.startswith("torch.nn.")

    def _repaired(self, node: fx.Node, error: Exception) -> Any:
        """The result of a node that failed, with what it reads repaired."""
        inputs = ", ".join(f"{n.name} {_shape(self.env[n])}" for n in node.all_input_nodes)
        name = node.target if node.op == "call_module" else node.name
        reason = f"`{name}` refused {inputs}: {first_line(error)}"
        of_tables = () if node.op == "call_module" else (self.tables.repair, self.counts.repair)
        for repair in (*of_tables, self.layouts.give_up):
            out = repair(node)
            if out is not None:
                return out
        if node.op == "call_module":
            raise OpenError({str(node.target)}, reason, whole_class=True) from error
        raise NoSiteError(reason) from error

    def _follows_length(self, node: fx.Node, counts: set[int]) -> bool:
        """Whether a module that numbered `counts` positions numbers others when it gets all tokens."""
        before = dict(self.env)
        for n in node.all_input_nodes:
            value, shape = self.env[n], shape_of(n)
            if isinstance(value, Tensor) and shape is not None:
                self.env[n] = value.new_empty(shape)
            elif is_size(value):
                self.env[n] = n.meta.get("value", value)
        try:
            with _RecordNumberings() as whole:
                self.plain(node)
        except RunError:
            return True
        finally:
            self.env = before
        return whole.counts != counts


class _RecordNumberings(TorchFunctionMode):
    """Records the whole numbers that calls such as `torch.arange` get."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in NUMBERING_CALLS:
            self.counts.update(cast(int, value) for value in (*args, *(kwargs or {}).values()) if is_size(value))
        return func(*args, **(kwargs or {}))


def _other_count(rows: TokenRows) -> int:
    """A number of patches that no operation confuses with all of them or broadcasts; 0 if there is none."""
    patches = rows.cells
    more = [rows.others - span.first - span.behind for span in rows.spans]
    dense = {patches + count for count in more}
    start = 2 * patches // 3
    counts = (*range(start, 1, -1), *range(start + 1, patches))
    return next((k for k in counts if dense.isdisjoint(k + count for count in more)), 0)


def _check_ends(rows: TokenRows, repairs: Repairs) -> None:
    """Refuses a repair that counts patches and the tokens of one end, where the other end has as many."""
    for name, span in repairs.spans():
        if rows.prefix == rows.suffix and bool(span.first) != bool(span.behind):
            raise NoSiteError(
                f"`{name}` counts {rows.count - rows.prefix} of {rows.count} tokens, and {rows.prefix} stand in front of the "
                "patches and behind them alike: its length does not tell which it leaves out"
            )


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else value
