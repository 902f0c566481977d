"""An interpreter that runs a graph on fewer tokens, and knows which values are still as in the dense graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from ..ops import TokenRows
from ..ops.rows import Span
from ..tracing.blocks import block_of
from ..tracing.graphs import Run, shape_of


@dataclass(frozen=True)
class TokenStream:
    """The tokens that become fewer.

    Attributes:
        node: The node whose value is (B, N, C).
        rows: What the N tokens stand for.
        blocks: Qualified names of the blocks that they run through.
        others: Those of other repeated blocks that run on tokens.
    """

    node: fx.Node
    rows: TokenRows
    blocks: tuple[str, ...]
    others: tuple[str, ...] = ()


class RunError(Exception):
    """A module or an operation raised `error`, which may be anything for a length that it was not made for."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class TokenRun(Run):
    """Runs a graph. Nodes after the tokens may see fewer of them.

    Args:
        root: The modules that the graph calls.
        stream: The tokens.
        kept: How many patches are left.

    Attributes:
        lengths: Token counts, all and kept, by the tokens that they count.
    """

    def __init__(self, root: nn.Module, stream: TokenStream, kept: int) -> None:
        super().__init__(root, garbage_collect_values=False, graph=stream.node.graph)
        self.extra_traceback = False  # errors are results here, and name the node themselves
        self.stream = stream
        rows = stream.rows
        left = {span: rows.others - span.first - span.behind for span in rows.spans}
        self.lengths: dict[Span, tuple[int, int]] = {span: (rows.cells + more, kept + more) for span, more in left.items()}

    def plain(self, node: fx.Node) -> Any:
        """Runs a node as it is.

        Raises:
            RunError: It fails.
        """
        try:
            return Run.run_node(self, node)
        except Exception as error:
            raise RunError(error) from error

    def in_block(self, node: fx.Node) -> bool:
        """Whether a node runs in a block. Code elsewhere, such as a head, may compute with the number of tokens too."""
        return block_of(node, self.stream.blocks) is not None or node.target in self.stream.blocks

    def is_dense(self, node: fx.Node) -> bool:
        """Whether a value, a tensor or a number, is as in the dense graph."""
        value = self.env[node]
        return tuple(value.shape) == shape_of(node) if isinstance(value, Tensor) else value == node.meta.get("value")

    def is_shorter(self, node: fx.Node, out: Any) -> bool:
        """Whether a result has its dense shape except for the number of positions."""
        dense = shape_of(node)
        if dense is None or not isinstance(out, Tensor) or len(dense) != out.ndim:
            return dense is None
        lengths = set(self.lengths.values())
        return all(size == before or (before, size) in lengths for before, size in zip(dense, out.shape, strict=True))


def is_size(value: object) -> bool:
    """Whether a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)
