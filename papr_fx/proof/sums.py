"""What becomes of the tokens that a reduction merges or drops: the papers' definitions, in other words than `papr_fx.ops`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..errors import VerifyError
from ..ops import (
    choose_tokens,
    fuse_tokens,
    match_tokens,
    mean_by_size,
    merge_tokens,
    most_attended,
    neighbour_graph,
    propagate_tokens,
    size_bias,
)
from ..passes.attend_tokens import AttentionPruning
from ..passes.fuse_tokens import TokenFusion
from ..passes.merge_tokens import Merge
from ..passes.propagate_tokens import TokenPropagation
from ..passes.reduction import Reduction
from ..planning.modes import TokenPlan
from ..planning.plan import keep_of
from ..tracing.graphs import cut, leaves_of
from .case import Case, ComparisonError

Summed = tuple[Tensor, Tensor]
_DEFINED = (Merge, TokenFusion, TokenPropagation, AttentionPruning)
_PICKS = (match_tokens, most_attended, choose_tokens)
_OTHERS = (neighbour_graph, size_bias, mean_by_size)
_OPTIONS = ("prefix", "suffix", "grid", "strength", "edges")


def check(case: Case) -> None:
    """Runs the module's own graph on two images, and follows tokens, their sizes and their places from block to block.

    Only for the reductions that this project defines. One of a user may say anything.

    Raises:
        ComparisonError: A call gives other tokens than its definition.
        VerifyError: It is given other sizes, places or options, or is missing, or in another block.
    """
    graph, mode, reduction = case.own_graph, case.rewrite.mode, case.rewrite.plan.reduction
    if not isinstance(mode, TokenPlan) or reduction is None or type(reduction) not in _DEFINED:
        return
    _check_blocks([site.block for site in mode.reduced.sites], case.rewrite.blocks, reduction)
    (choice,) = case.rewrite.choices
    keep = keep_of(graph, choice)
    attentions = {f"{name}{end}" for name, _ in mode.reduced.attentions for end in ("", "_mixed")}  # that of torch, opened
    calls = dict.fromkeys(node for node in graph.nodes if node.target in (*_PICKS, *_SUMS, *_OTHERS))
    needed = dict.fromkeys((keep, *_read(calls)))
    values = dict(zip(needed, case.run(cut(case.root, graph, *needed), case.images), strict=True))
    follower = _Follower(reduction, choice.rows.prefix, choice.rows.suffix, choice.rows.grid, values[keep])
    for node in graph.nodes:
        if node.name in attentions:
            follower.attends(node)
        elif node in calls:
            given = inspect.signature(node.target).bind(*node.args, **node.kwargs)
            given.apply_defaults()
            follower.calls(node, fx.map_arg(given.arguments, lambda leaf: values[leaf]), values[node])
    follower.ends(len(mode.reduced.sites))


def _check_blocks(found: list[str], names: Sequence[str], reduction: Reduction) -> None:
    """Whether the sites are in the blocks that the reduction names."""
    count = len(names)
    words = {"all": [*range(count)], "second-half": [*range(count // 2, count)]}
    numbers = words[reduction.blocks] if isinstance(reduction.blocks, str) else sorted({n % count for n in reduction.blocks})
    if found != [names[number] for number in numbers]:
        raise VerifyError(f"merging: tokens are reduced in {found}, and blocks={reduction.blocks!r} of {list(names)}")


def _read(calls: Iterable[fx.Node]) -> list[fx.Node]:
    """The calls, and what they are given."""
    leaves = [leaf for node in calls for leaf in (*leaves_of((node.args, node.kwargs)), node)]
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node)]


class _Follower:
    """What is known of the tokens at one place of the graph: sizes (B, N), None while all are 1; places (B, N) in the dense."""

    def __init__(self, reduction: Reduction, prefix: int, suffix: int, grid: tuple[int, ...], places: Tensor) -> None:
        self.options: dict[str, Any] = {**vars(reduction), "prefix": prefix, "suffix": suffix, "grid": grid}
        self.reduction = reduction
        self.removed: dict[int, tuple[int, int]] = {}  # how many, and of how many patches, by number among the chosen blocks
        self.owes = ""  # a pick whose tokens are still to be summed
        self.sizes: Tensor | None = None
        self.places = places
        self.stay: Tensor | None = None
        self.weighted = True

    def attends(self, node: fx.Node) -> None:
        """An attention over the tokens: in proportion to sizes, if it is to be."""
        if self.reduction.proportional and not self.weighted:
            raise VerifyError(f"merging: `{node.name}` does not weigh tokens by what they stand for")

    def calls(self, node: fx.Node, given: Mapping[str, Any], found: Any) -> None:
        """One of the calls, with what it was given, by the names of its arguments, and what it gave."""
        for name in _OPTIONS:
            if name in given and given[name] != self.options[name]:
                raise VerifyError(f"merging: `{node.name}` is given {name} {given[name]}, not {self.options[name]}")
        if node.target in _PICKS:
            self._picks(node, found[0] if isinstance(found, tuple) else found)
        if "sizes" in given:
            self._check_sizes(node, given["sizes"])
        if node.target is neighbour_graph and not self._at(given["places"]):
            raise VerifyError(f"merging: `{node.name}` takes tokens for others in the image")
        if node.target is size_bias:
            if not self.reduction.proportional:
                raise VerifyError(f"merging: `{node.name}` weighs tokens, and proportional=False")
            self.weighted = True
        if node.target in _SUMS:
            self._sums(node, given, found)

    def _picks(self, node: fx.Node, stay: Tensor) -> None:
        if self.stay is not None:
            self.places = self.places.gather(1, self.stay)
        total = self.places.shape[1]
        patches = total - self.options["prefix"] - self.options["suffix"]
        place, numbers = int(node.name.rpartition("_")[2]), self.reduction.numbers
        removed = total - stay.shape[1]
        if self.reduction.schedule == "constant":
            wanted = numbers[0] if isinstance(self.reduction.r, int) else numbers[place]
            if removed != min(wanted, patches // 2):
                raise VerifyError(f"merging: `{node.name}` removes {removed} of {patches} patches, not {wanted}")
        self.removed[place] = removed, patches
        self._is_paid()
        drops = isinstance(self.reduction, TokenFusion) and place < self.reduction.linear_from
        self.owes = "" if drops or isinstance(self.reduction, AttentionPruning) else node.name
        self.stay = stay

    def _is_paid(self) -> None:
        if self.owes:
            raise VerifyError(f"merging: what `{self.owes}` picks is dropped, not merged")

    def ends(self, sites: int) -> None:
        """The end of the graph, with that many sites."""
        self._is_paid()
        numbers = self.reduction.numbers
        wanted = [place for place in range(sites) if numbers[0 if isinstance(self.reduction.r, int) else place]]
        if self.reduction.schedule == "constant" and [*self.removed] != wanted:
            raise VerifyError(f"merging: tokens are reduced at the sites {[*self.removed]}, not {wanted}")
        if self.reduction.schedule != "constant" and not self._is_spread(sites):
            amounts = [amount for amount, _ in self.removed.values()]
            raise VerifyError(f"merging: {amounts} tokens are removed, which is not the schedule {self.reduction.schedule!r}")

    def _is_spread(self, sites: int) -> bool:
        """Whether one factor gives all amounts, rounded: times the square of the place, or times the patches."""
        left = next((patches for _, patches in self.removed.values()), 0)
        low, high = 0.0, inf
        for place in range(sites):
            amount, patches = self.removed.get(place, (0, left))
            left = patches - amount
            weight = (place + 1) ** 2 if self.reduction.schedule == "late" else max(1, patches)
            low = max(low, (amount - 0.5) / weight)
            if amount < patches // 2:  # no block removes more
                high = min(high, (amount + 0.5) / weight)
        return low <= high

    def _check_sizes(self, node: fx.Node, sizes: Tensor | None) -> None:
        right = sizes is None if self.sizes is None else sizes is not None and _close(sizes, self.sizes)
        if not right:
            raise VerifyError(f"merging: `{node.name}` is given other sizes than its tokens have by then")

    def _at(self, places: Tensor | None) -> bool:
        if places is None:
            return torch.equal(
                self.places, torch.arange(self.places.shape[1], device=self.places.device).expand_as(self.places)
            )
        return torch.equal(places, self.places)

    def _sums(self, node: fx.Node, given: Mapping[str, Any], found: Summed) -> None:
        if not self.owes:
            raise VerifyError(f"merging: `{node.name}` merges what is to be dropped")
        self.owes = ""
        tokens = cast(Tensor, given["tokens"]).double()
        sizes = torch.ones_like(tokens[:, :, 0]) if self.sizes is None else self.sizes.double()
        rest = [value for name, value in given.items() if name not in ("tokens", "sizes")]
        function = cast(Any, node.target)
        wanted = _SUMS[function](tokens, sizes, *rest)
        if not all(_close(one.double(), other) for one, other in zip(found, wanted, strict=True)):
            raise ComparisonError(f"merging: `{node.name}` gives other tokens than `{function.__name__}` says")
        self.sizes, self.weighted = wanted[1], False


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two results are equal up to rounding."""
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-5 * b.abs().max()) if b.numel() else a.shape == b.shape


def _shares(sizes: Tensor, matching: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Which tokens (B, N, M) each of M new ones is made of, each as often as patches that it stands for; and M new sizes."""
    stay, merged, into = matching
    group = torch.zeros_like(sizes, dtype=torch.int64)
    group.scatter_(1, stay, torch.arange(stay.shape[1], device=stay.device).expand_as(stay)).scatter_(1, merged, into)
    members = F.one_hot(group, stay.shape[1]).double() * sizes.unsqueeze(2)
    return members, members.sum(1)


def _merged(tokens: Tensor, sizes: Tensor, matching: tuple[Tensor, Tensor, Tensor]) -> Summed:
    """The mean of its members, weighted by size (Bolya et al., ICLR 2023, Sec. 3.2)."""
    members, sums = _shares(sizes, matching)
    return torch.einsum("bnm,bnc->bmc", members / sums.unsqueeze(1), tokens), sums


def _fused(tokens: Tensor, sizes: Tensor, matching: tuple[Tensor, Tensor, Tensor]) -> Summed:
    """That mean, as long as its longest member (MLERP; Kim et al., WACV 2024, Sec. 3)."""
    means, sums = _merged(tokens, sizes, matching)
    lengths = tokens.square().sum(2).sqrt().unsqueeze(2) * (_shares(sizes, matching)[0] > 0)
    return means / means.square().sum(2, keepdim=True).sqrt() * lengths.amax(1).unsqueeze(2), sums


def _propagated(tokens: Tensor, sizes: Tensor, chosen: tuple[Tensor, Tensor], weights: Tensor, strength: float) -> Summed:
    """X_stay + strength * A_hat X_drop, for tokens and sizes (Xu et al., WACV 2024, Sec. 3)."""
    dropped = torch.zeros_like(sizes).scatter(1, chosen[1], 1.0)
    spread = torch.eye(sizes.shape[1], device=sizes.device).double() + strength * weights.double() * dropped.unsqueeze(1)
    both = spread @ torch.cat([tokens, sizes.unsqueeze(2)], 2)  # (B, N, C + 1)
    kept = torch.stack([sample[stay] for sample, stay in zip(both, chosen[0], strict=True)])
    return kept[:, :, :-1], kept[:, :, -1]


_SUMS: Mapping[Any, Callable[..., Summed]] = {merge_tokens: _merged, fuse_tokens: _fused, propagate_tokens: _propagated}
