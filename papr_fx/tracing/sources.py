"""Graph modules whose source text goes with their code.

`torch.fx` keeps the text of all code that it ever made of graphs, for tracebacks: some ten kilobytes for each of the many graph
modules of one `transform`, for the life of the process. A server that transforms, copies or retargets now and then would grow.
"""

from __future__ import annotations

import weakref
from types import FunctionType
from typing import cast

from torch import fx
from torch.fx.graph import PythonCode

from ..versions import forget_source


class GraphModule(fx.GraphModule):
    """A graph module as of `torch.fx`, except that its source text is kept only as long as anything can run its code."""

    def recompile(self) -> PythonCode:
        made = super().recompile()
        code = cast(FunctionType, vars(type(self))["forward"]).__code__
        weakref.finalize(code, forget_source, code.co_filename).atexit = False
        return made
