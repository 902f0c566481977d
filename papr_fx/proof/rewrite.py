"""The rewrite under proof, as the parts see it: its graphs, its sites, and where it chooses positions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from torch import fx

from ..dataflow.positions import Layout
from ..passes.merge_tokens import Merge
from ..passes.prune_pixels import Site
from ..planning.plan import Choice, Pixels, Plan, Tokens


class Stream(NamedTuple):
    """A value of the dense graph whose positions should be in row-major order of a grid.

    Attributes:
        node: Name of its node.
        layout: Axes of the value.
        prefix: Tokens before the grid's positions.
        grid: Rows and columns, for clips (frames, rows, columns).
    """

    node: str
    layout: Layout
    prefix: int
    grid: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Rewrite:
    """One of a plan's two graphs at a keep ratio.

    Attributes:
        plan: The plan, with its reduction.
        z: Keep ratio in (0, 1).
        training: Whether the graph is for training mode.
    """

    plan: Plan
    z: float
    training: bool

    @cached_property
    def _pruning(self) -> Plan:
        return replace(self.plan.pruning, z=self.z)

    @property
    def name(self) -> str:
        """Class name of the model, with the mode if that is training."""
        return f"{self.plan.name} in training mode" if self.training else self.plan.name

    @property
    def image_layout(self) -> str:
        """Axes of the images by letter."""
        return self.plan.layout

    @property
    def differs_in_training(self) -> bool:
        """Whether there is another graph for training mode."""
        return not self.plan.one_graph and not isinstance(self.plan.dense[True], str)

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """Where positions are chosen, in order."""
        return self._pruning.choices(self.training)

    @property
    def prunes_tokens(self) -> bool:
        """Whether tokens are pruned; else pixel operators are."""
        return isinstance(self.plan.operator, Tokens)

    @property
    def pixel_sites(self) -> tuple[Site, ...]:
        """The pixel operators that are pruned; empty for tokens."""
        return self.plan.operator.sites[self.training] if isinstance(self.plan.operator, Pixels) else ()

    @property
    def background(self) -> str:
        """The value at positions that a pixel operator drops: "keep", "zero" or "auto"."""
        return self.plan.operator.background if isinstance(self.plan.operator, Pixels) else "auto"

    @property
    def blocks(self) -> tuple[str, ...]:
        """Qualified names of the blocks that run on fewer tokens; empty for pixel operators."""
        return self.plan.operator.blocks if isinstance(self.plan.operator, Tokens) else ()

    @property
    def reduced_additions(self) -> list[str]:
        """The residual additions after which tokens are reduced; empty without a reduction."""
        target = self.plan.operator
        if not isinstance(target, Tokens) or not target.reduction:
            return []
        return [site.addition for site in target.reduced[self.training].sites]

    @cached_property
    def streams(self) -> dict[Stream, tuple[str, ...]]:
        """Streams whose order the choices rely on, each with the residual additions to blame; none to blame for tokens."""
        if self.prunes_tokens:
            return {Stream(c.stream, c.layout, c.prefix, c.grid): () for c in self.choices}
        streams = [(Stream(*site.ordered, site.prefix, site.grid), site.merge) for site in self.pixel_sites]
        return {stream: tuple(name for other, name in streams if other == stream) for stream, _ in streams}

    def additions_on(self, grid: tuple[int, ...]) -> tuple[str, ...]:
        """The residual additions of pixel operators on a grid; none for tokens."""
        return tuple(site.merge for site in self.pixel_sites if site.grid == grid)

    def dense_graph(self) -> fx.Graph:
        """A copy of the traced graph."""
        return self.plan.dense_graph(self.training)

    def pruned_graph(self) -> fx.Graph:
        """The rewritten graph without its reduction. The chosen indices are further inputs; what chose them is dead code."""
        graph = self._pruning.rewrite(self.training)
        nodes = {node.name: node for node in graph.nodes}
        last = graph.find_nodes(op="placeholder")[0]
        for choice in self.choices:
            with graph.inserting_after(last):
                last = graph.placeholder(f"keep{choice.suffix}")
            nodes[f"papr_keep{choice.suffix}"].replace_all_uses_with(last)
        return graph

    def merging_graph(self) -> fx.Graph:
        """The graph on all tokens that merges them, in proportion to their sizes, where the plan reduces them."""
        target = self.plan.operator
        assert isinstance(target, Tokens)
        assert target.reduction
        merge = Merge(max(1, target.reduction.r), target.reduction.blocks)
        return replace(self.plan, z=1.0, operator=replace(target, reduction=merge)).rewrite(self.training)


def find_node(graph: fx.Graph, name: str) -> fx.Node:
    """The node of that name."""
    return next(node for node in graph.nodes if node.name == name)
