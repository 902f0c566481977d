"""Finds out at which end of a token stream its other tokens stand: in front of the patches or behind them."""

from __future__ import annotations

from torch import Tensor, fx

from ..errors import NoSiteError
from ..ops import TokenRows
from .patches import moved_rows


def tokens_behind(part: fx.GraphModule, images: Tensor, rows: TokenRows) -> int:
    """How many tokens stand behind the patches of a stream.

    A patch token follows from the image, and a class token does not. So the image is filled with NaN: the rows of the stream
    that are not NaN are the other tokens.

    Args:
        part: The graph as far as the stream, over a scratch copy of the model's modules.
        images: Images of the traced shape.
        rows: What the stream's rows stand for, with all other tokens in front.

    Raises:
        NoSiteError: Other tokens stand between the patches.
        TraceError: The graph does not run.
    """
    if not rows.prefix:
        return 0
    moved = moved_rows(part, images)[0]
    if int(moved.sum()) != rows.cells:  # another token is computed from the image too, which `proof/geometry` refuses
        return 0
    first = int(moved.int().argmax())
    if not bool(moved[first : first + rows.cells].all()):
        stream = part.graph.output_node().all_input_nodes[0].name
        runs = " + ".join(str(len(run)) for run in "".join("x" if row else " " for row in moved.tolist()).split())
        raise NoSiteError(
            f"other tokens stand between the patches of `{stream}`: sought {rows.cells} patches in one run, found {runs}. Put "
            "the other tokens in front of the patches or behind them"
        )
    return len(moved) - first - rows.cells
