"""Everything a rewritten graph follows from: per mode the dense graph and its sites, and the keep ratio."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from torch import fx

from ..errors import NoSiteError
from ..passes import fuse_attention, reduce_tokens
from ..passes.fuse_attention import Fusing
from ..passes.kinds import Kind
from ..passes.reduction import Reduction
from ..proposals.network import SignificanceNet
from ..tracing.roles import find
from ..versions import without_types
from .example import Example
from .modes import Choice, ModePlan, PixelPlan, Refused, Stage, Target, TokenPlan
from .signature import Signature


@dataclass(frozen=True)
class Plan:
    """Everything a rewritten graph follows from, so that another keep ratio is one more rewrite of the dense graph.

    Attributes:
        name: Class name of the model.
        eval: The plan for eval mode.
        train: The plan for training mode. It is that for eval mode itself where both have the same graph.
        opened: Qualified names of the modules that were traced through.
        example: The images that the graphs were traced with.
        target: Keep ratio and geometry.
        signature: The arguments that the module is called with.
        output: What the module returns: "logits", as the model's forward does, or "features".
        fallback: Why a model was pruned by pixels although tokens come first; empty otherwise.
        fusing: Where attention that is written out becomes one call, in eval mode.
    """

    name: str
    eval: ModePlan
    train: ModePlan | Refused
    opened: frozenset[str]
    example: Example
    target: Target
    signature: Signature
    output: str = "logits"
    fallback: str = ""
    fusing: Fusing = field(default_factory=Fusing)

    @property
    def z(self) -> float:
        """Keep ratio in (0, 1]."""
        return self.target.z

    @property
    def kind(self) -> str:
        """What is pruned: "tokens" or "pixels"."""
        return self.eval.kind

    @property
    def reduction(self) -> Reduction | None:
        """How tokens become fewer from block to block, if they do."""
        return self.eval.reduction if isinstance(self.eval, TokenPlan) else None

    @property
    def narrows(self) -> bool:
        """Whether anything is left out, in either mode, that nobody reads."""
        return any(isinstance(mode, TokenPlan) and mode.narrows for mode in (self.eval, self.train))

    @property
    def unheard(self) -> frozenset[str]:
        """Qualified names of the modules that nothing calls: those traced through, and parts of attention that is one call."""
        fused = {name for site in self.fusing.sites for name in site.nodes}
        called = self.eval.dense.find_nodes(op="call_module") if fused else ()
        return self.opened | {str(node.target) for node in called if node.name in fused}

    @property
    def one_graph(self) -> bool:
        """Whether training and eval mode have the same rewritten graph."""
        if self.fusing.sites:
            return False
        if self.train is self.eval:
            return True
        if not isinstance(self.train, PixelPlan) or not isinstance(self.eval, PixelPlan):
            return False
        same_sites = self.train.dense is self.eval.dense and self.train.sites == self.eval.sites
        return same_sites and self.train.backgrounds() == self.eval.backgrounds()

    def mode(self, training: bool) -> ModePlan:
        """The plan of one mode.

        Raises:
            NoSiteError: The model cannot be pruned in it.
        """
        found = self.train if training else self.eval
        if isinstance(found, Refused):
            raise NoSiteError(f"{self.name} cannot be pruned in {'training' if training else 'eval'} mode: {found.reason}")
        return found

    def at(self, z: float) -> Plan:
        """The same plan for another keep ratio.

        Raises:
            NoSiteError: More tokens should be removed from block to block than it leaves.
        """
        if isinstance(self.eval, TokenPlan) and self.eval.reduction is not None:
            (choice,) = self.eval.choices()
            reduce_tokens.check_amounts(self.eval.reduced, self.eval.reduction, choice.kept(z) - choice.rows.others, z)
        return replace(self, target=replace(self.target, z=z))

    def seeing(self, network: SignificanceNet) -> Plan:
        """The same plan for the maps of a network."""
        return replace(self, target=replace(self.target, fine=network.fine))

    def restoring(self, fill: str) -> Plan:
        """The same plan with another content of dropped places, where tokens are laid out as their grid."""
        return replace(self, target=replace(self.target, restore=fill))

    def reducing(self, reduction: Reduction | None) -> Plan:
        """The same plan of a token model with another reduction, or with none."""
        return self._each(lambda mode: replace(mode, reduction=reduction) if isinstance(mode, TokenPlan) else mode)

    def computing_all_rows(self, reason: str = "") -> Plan:
        """The same plan of a token model without narrowing, for this reason."""
        return self._each(lambda mode: mode.computing_all(reason) if isinstance(mode, TokenPlan) else mode)

    def computing_more(self, reason: str) -> Plan:
        """The same plan of a token model with less left out, for this reason: at first with all patches embedded."""
        return self._each(lambda mode: mode.computing_more(reason) if isinstance(mode, TokenPlan) else mode)

    def of_one_size(self) -> Plan:
        """The same plan for images of the traced size alone."""
        shape, layout = self.example.shape, self.target.layout
        return replace(self, target=replace(self.target, sizes=()), signature=self.signature.for_size(shape, layout))

    def writing_out(self, reason: str = "") -> Plan:
        """The same plan with attention as it is written, for this reason."""
        return replace(self, fusing=Fusing(reason=reason))

    def without(self, additions: Collection[str], reason: str) -> Plan:
        """The same plan of a hierarchical model, except that the operators that feed `additions` stay dense."""
        return self._each(lambda mode: mode.without(additions, reason) if isinstance(mode, PixelPlan) else mode)

    def _each(self, change: Callable[[ModePlan], ModePlan]) -> Plan:
        changed, other = change(self.eval), self.train
        train = changed if other is self.eval else other if isinstance(other, Refused) else change(other)
        return replace(self, eval=changed, train=train)

    def dense_graph(self, training: bool) -> fx.Graph:
        """A copy of the traced graph."""
        return without_types(copy.deepcopy(self.mode(training).dense))

    def rewrite(self, training: bool, stage: Stage = lambda name, graph: None) -> fx.Graph:
        """The graph for keep ratio `z`. At 1 it is the dense one, unless tokens are reduced: nothing is left to choose."""
        graph = self.dense_graph(training)
        stage("trace", graph)
        return self.prune(graph, training, stage) if self.z < 1 or self.mode(training).reduces else graph

    def prune(self, graph: fx.Graph, training: bool, stage: Stage = lambda name, graph: None) -> fx.Graph:
        """Rewrites a traced graph of the model, in place, and returns it."""
        self.mode(training).prune(graph, self.target, stage)
        if self.fusing.sites and self.z < 1 and not training:
            fuse_attention.rewrite(graph, self.fusing.sites)
            stage("fuse_attention", graph)
        graph.lint()
        return graph

    def choices(self, training: bool) -> tuple[Choice, ...]:
        """Where positions are chosen, in order."""
        return self.mode(training).choices()


def keep_of(graph: fx.Graph, choice: Choice) -> fx.Node:
    """The node of a rewritten graph that holds the kept indices of `choice`."""
    return find(graph, Kind.KEEP, choice.number)
