"""Residual branches: which nodes feed an addition beside its shortcut, and which axes of their values hold positions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch import fx, nn

from ..tracing.graphs import ancestors, called, shape_of
from .positionwise import Layout, PositionwiseProbe, Verdict


@dataclass(frozen=True)
class Branch:
    """A residual branch.

    Attributes:
        addition: The residual addition.
        end: Its operand that the branch computes.
        residual: Its other operand, the shortcut.
        sources: The residual and the values that it is a copy or a scaled form of, latest first.
        region: The nodes that feed only the addition, in order, back to the sources or depthwise convolutions.
        entries: The values that enter the region, in order.
        convolutions: Those of them that depthwise convolutions compute.
    """

    addition: fx.Node
    end: fx.Node
    residual: fx.Node
    sources: tuple[fx.Node, ...]
    region: tuple[fx.Node, ...]
    entries: tuple[fx.Node, ...]
    convolutions: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Layouts:
    """A region whose nodes are all position-wise.

    Attributes:
        layouts: The layouts of its entries and nodes.
        masked: Its nodes that treat dropped positions as zeros.
    """

    layouts: dict[fx.Node, Layout]
    masked: frozenset[fx.Node]


@dataclass(frozen=True)
class BranchReader:
    """Reads residual branches of one graph.

    Attributes:
        root: The modules that the graph calls.
        varying: The nodes that depend on the images.
        probe: Runs nodes on numbers.
    """

    root: nn.Module
    varying: frozenset[fx.Node]
    probe: PositionwiseProbe

    def branch(self, addition: fx.Node, end: fx.Node, residual: fx.Node) -> Branch:
        """The branch that ends in operand `end` of an addition."""
        sources = self._sources(residual)
        region, entries = self._region(addition, end, sources)
        convolutions = tuple(entry for entry in entries if is_depthwise(entry, self.root))
        return Branch(addition, end, residual, tuple(sources), tuple(region), tuple(entries), convolutions)

    def pointwise_layers(self, branch: Branch) -> list[fx.Node]:
        """The nodes of a branch that are, or call modules that hold, a Linear or a 1x1 convolution."""
        return [node for node in branch.region if self._is_pointwise(node)]

    def foreign_entries(self, branch: Branch) -> list[fx.Node]:
        """Values that enter a branch and are neither the residual's source, nor a depthwise convolution, nor feed one."""
        feeding = {node for conv in branch.convolutions for node in ancestors(conv)}
        feeding |= {part for node in feeding if shape_of(node) is None for part in node.users}  # other parts of a split
        return [e for e in branch.entries if e not in feeding and e not in branch.sources and e not in branch.convolutions]

    def find_layouts(self, branch: Branch) -> Layouts | str:
        """The layouts of a branch under which all its nodes are position-wise; otherwise why the best attempt failed."""
        attempts: list[tuple[int, str]] = []
        for hypothesis in product(*(_hypotheses(entry, entry in branch.convolutions) for entry in branch.entries)):
            found = self._followed(branch, dict(zip(branch.entries, hypothesis, strict=True)))
            if isinstance(found, Layouts):
                return found
            attempts.append(found)
        return max(attempts)[1]

    def _followed(self, branch: Branch, layouts: dict[fx.Node, Layout]) -> Layouts | tuple[int, str]:
        """Completes the layouts of the entries through the region; otherwise how far that went, and what failed."""
        masked: set[fx.Node] = set()
        for count, node in enumerate(branch.region):
            known = all(n in layouts or n not in self.varying for n in node.all_input_nodes)
            if not known or (shape_of(node) is None and "parts" not in node.meta):
                verdict = Verdict(reason="handles sizes of the images, so it depends on the size of the grid")
            else:
                verdict = self.probe.verdict(node, layouts)
            if not verdict.layout:
                return count, f"`{node.target if node.op == 'call_module' else node.name}` {verdict.reason}"
            layouts[node] = verdict.layout
            if verdict.masked:
                masked.add(node)
        return Layouts(layouts, frozenset(masked))

    def _sources(self, residual: fx.Node) -> list[fx.Node]:
        """The residual and what it copies or scales, upstream through identities and modules of one vector."""
        found = [residual]
        while found[-1].op == "call_module" and len(found[-1].all_input_nodes) == 1:
            before = found[-1].all_input_nodes[0]
            module = self.root.get_submodule(str(found[-1].target))
            vectors = [parameter.ndim <= 1 for parameter in module.parameters()]
            scaled = isinstance(module, nn.Identity) or vectors == [True]
            if not scaled or shape_of(before) != shape_of(found[-1]):
                break
            found.append(before)
        return found

    def _region(self, addition: fx.Node, end: fx.Node, sources: Iterable[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        """The nodes that feed only the addition, up to the sources and depthwise convolutions; the values that enter."""
        stops = set(sources)
        region: dict[fx.Node, None] = {}
        entries: dict[fx.Node, None] = {}
        wanted = {end}
        node = addition
        while wanted - region.keys() - entries.keys() and (node := node.prev).op != "root":
            if node not in wanted:
                continue
            inside = all(user in region or user is addition for user in node.users)
            if node in stops or is_depthwise(node, self.root) or not inside or node not in self.varying:
                if node in self.varying:
                    entries[node] = None
                else:
                    wanted.discard(node)
                continue
            region[node] = None
            wanted.update(node.all_input_nodes)
        for entry in [e for e in entries if shape_of(e) is None]:  # parts of a split that others use too enter one by one
            del entries[entry]
            for user in [u for u in entry.users if u in region]:
                del region[user]
                entries[user] = None
        return list(region)[::-1], list(entries)[::-1]  # both were met latest first

    def _is_pointwise(self, node: fx.Node) -> bool:
        if called(node) in ("conv2d", "conv3d") and node.op == "call_function":  # of a weight that is computed
            weight = node.kwargs.get("weight", node.args[1] if len(node.args) > 1 else None)
            return isinstance(weight, fx.Node) and prod((shape_of(weight) or (0, 0, 0))[2:]) == 1
        if node.op != "call_module":
            return node.target is torch.nn.functional.linear
        modules = self.root.get_submodule(str(node.target)).modules()
        return any(
            isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d | nn.Conv3d) and prod(m.kernel_size) == 1) for m in modules
        )


def is_depthwise(node: fx.Node, root: nn.Module) -> bool:
    """Whether `node` calls a convolution with one kernel per channel, over more than one position."""
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(module, nn.Conv2d | nn.Conv3d):
        return False
    return module.groups == module.in_channels == module.out_channels > 1 and prod(module.kernel_size) > 1


def _hypotheses(entry: fx.Node, convolution: bool) -> tuple[Layout, ...]:
    axes = len(shape_of(entry) or ())
    if convolution:
        return ("BCHW" if axes == 4 else "BCTHW",)
    return {4: ("BHWC", "BCHW"), 5: ("BTHWC", "BCTHW")}.get(axes, ("BNC", "BCN"))
