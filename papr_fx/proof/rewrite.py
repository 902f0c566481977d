"""The rewrite under proof, as the parts see it: its graphs, its sites, and where it chooses positions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import fx

from ..dataflow.positionwise import Layout
from ..ops import TokenRows
from ..passes.merge_tokens import Merge
from ..passes.prune_pixels import PixelSite
from ..planning.modes import Choice, ModePlan, PixelPlan, Refused, TokenPlan
from ..planning.plan import Plan, keep_of


class Stream(NamedTuple):
    """A value of the dense graph whose positions should be in row-major order of a grid.

    Attributes:
        node: Name of its node.
        layout: Axes of the value.
        rows: The grid, and the tokens before its positions.
    """

    node: str
    layout: Layout
    rows: TokenRows


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
        return self.plan.reducing(None).computing_all_rows().writing_out().at(self.z)

    @property
    def mode(self) -> ModePlan:
        """The plan of the mode."""
        return self.plan.mode(self.training)

    @property
    def name(self) -> str:
        """Class name of the model, with the mode if that is training."""
        return f"{self.plan.name} in training mode" if self.training else self.plan.name

    @property
    def image_layout(self) -> str:
        """Axes of the images by letter."""
        return self.plan.target.layout

    @property
    def differs_in_training(self) -> bool:
        """Whether there is another graph for training mode. That attention is written out there does not count."""
        return not self.plan.writing_out().one_graph and not isinstance(self.plan.train, Refused)

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """Where positions are chosen, in order."""
        return self._pruning.choices(self.training)

    @property
    def prunes_tokens(self) -> bool:
        """Whether tokens are pruned; else pixel operators are."""
        return self.plan.kind == "tokens"

    @property
    def pixel_sites(self) -> tuple[PixelSite, ...]:
        """The pixel operators that are pruned; empty for tokens."""
        return self.mode.sites if isinstance(self.mode, PixelPlan) else ()

    @property
    def blocks(self) -> tuple[str, ...]:
        """Qualified names of the blocks that run on fewer tokens; empty for pixel operators."""
        return self.mode.blocks if isinstance(self.mode, TokenPlan) else ()

    @property
    def coarse(self) -> bool:
        """Whether patches that are not kept become coarse tokens."""
        return isinstance(self.mode, TokenPlan) and self.mode.coarse

    @property
    def narrows(self) -> bool:
        """Whether anything is left out that nobody reads."""
        return isinstance(self.mode, TokenPlan) and self.mode.narrows

    @property
    def fuses(self) -> bool:
        """Whether attention that is written out becomes one call."""
        return bool(self.plan.fusing.sites) and not self.training

    @property
    def reduced_additions(self) -> list[str]:
        """The residual additions after which tokens are reduced; empty without a reduction."""
        mode = self.mode
        return [site.addition for site in mode.reduced.sites] if isinstance(mode, TokenPlan) and mode.reduction else []

    @cached_property
    def streams(self) -> dict[Stream, tuple[str, ...]]:
        """Streams whose order the choices rely on, each with the residual additions to blame; none to blame for tokens."""
        if self.prunes_tokens:
            return {Stream(c.stream, c.layout, c.rows): () for c in self.choices}
        streams = [(Stream(*site.ordered, site.rows), site.addition) for site in self.pixel_sites]
        return {stream: tuple(name for other, name in streams if other == stream) for stream, _ in streams}

    def additions_on(self, grid: tuple[int, ...]) -> tuple[str, ...]:
        """The residual additions of pixel operators on a grid; none for tokens."""
        return tuple(site.addition for site in self.pixel_sites if site.rows.grid == grid)

    def dense_graph(self) -> fx.Graph:
        """A copy of the traced graph."""
        return self.plan.dense_graph(self.training)

    def pruned_graph(self) -> fx.Graph:
        """The rewritten graph without reduction, narrowing and fusing. The chosen indices are further inputs."""
        return self._with_choices(self._pruning.rewrite(self.training))

    def graph_on(self, *, narrow: bool = True, fuse: bool = True) -> fx.Graph:
        """The same with its reduction, and with narrowing and fusing or without."""
        plan = self.plan if narrow else self.plan.computing_all_rows()
        plan = plan if fuse else plan.writing_out()
        z = min(plan.z, 0.9) if self.mode.reduces else self.z  # as planned: a smaller one may leave too few tokens to reduce
        return self._with_choices(plan.at(z).rewrite(self.training))

    def _with_choices(self, graph: fx.Graph) -> fx.Graph:
        """The graph with the chosen indices as further inputs. What chose them is dead code."""
        last = graph.find_nodes(op="placeholder")[0]
        for choice in self.choices:
            with graph.inserting_after(last):
                last = graph.placeholder(f"keep_{choice.number}")
            keep_of(graph, choice).replace_all_uses_with(last)
        return graph

    def merging_graph(self) -> fx.Graph:
        """The graph on all tokens that merges them, in proportion to their sizes, where the plan reduces them."""
        assert isinstance(self.mode, TokenPlan)
        assert self.mode.reduction
        numbers = self.mode.reduction.numbers
        merge = Merge(max(1, sum(numbers) // len(numbers)), self.mode.reduction.blocks)  # at every site, in any schedule
        return self.plan.reducing(merge).at(1.0).rewrite(self.training)
