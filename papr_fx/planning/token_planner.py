"""Finds the plan of a token model: which graph, which site, and whether its blocks run on fewer tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

from torch import Tensor, fx, nn

from ..dataflow.layouts import MixingError
from ..dataflow.repairs import Repairs
from ..errors import ArgumentError, NoSiteError, TraceError
from ..passes import coarsen_background, fuse_attention, gather_positions, prune_tokens, reduce_tokens
from ..passes.fuse_attention import Fusing
from ..passes.prune_tokens import TokenSite
from ..passes.reduce_tokens import ReductionSites
from ..tracing.asked import casts_images, with_questions
from ..tracing.blocks import ancestors_of, is_inside
from ..tracing.fakes import scratch_copy
from ..tracing.graphs import cut, same_graph
from ..tracing.sequence_first import add_batch_first
from ..tracing.trace import OpenError, Traced, trace
from ..tracing.trunk import Trunk
from . import inputs
from .ends import tokens_behind
from .example import Example
from .left_out import Attempt
from .modes import Refused, Target, TokenOptions, TokenPlan
from .patches import check_apart, patch_dropout
from .plan import Plan
from .reads import check_batch_reads
from .signature import Signature
from .sizes import counts_follow, taken_sizes

REFUSED = (
    "the blocks of {} do not run on fewer tokens: they use positions beyond the embedding in a way that gathering cannot "
    "repair (a reshape to the grid inside a block, a window)"
)


@dataclass(frozen=True)
class TokenPlanner:
    """Finds the plan of a token model for its trunk. Modules are traced through where a pass asks for it.

    Attributes:
        request: The model and its images.
        trunk: Its blocks.
        options: How it is pruned.
        attempt: What is to be left out because nobody reads it.
        attentions: Modules to trace through because they hold attention that can be one call.
    """

    request: inputs.Request
    trunk: Trunk
    options: TokenOptions
    attempt: Attempt
    attentions: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """Class name of the model."""
        return type(self.request.model).__name__

    @property
    def blocks(self) -> tuple[str, ...]:
        """Qualified names of the trunk's blocks."""
        return self.trunk.blocks

    def plan(self) -> tuple[nn.Module, Plan, list[fx.Graph]]:
        """The modules that the graphs call, the plan, and all that was recorded in eval and training mode."""
        if not self.blocks:
            raise NoSiteError(f"{self.name} has no repeated blocks: sought composite modules (modules of modules), found none")
        if self.trunk.spatial:
            raise prune_tokens.no_tokens(self.trunk.spatial)
        opened = ancestors_of(self.blocks) | self.attentions
        while True:
            try:
                return self._plan(opened)
            except OpenError as error:
                opened |= self._to_open(error, opened)

    def _plan(self, opened: set[str]) -> tuple[nn.Module, Plan, list[fx.Graph]]:
        """The plan with these modules traced through, or `OpenError`."""
        model, images, layout = self.request
        for name in opened:
            inputs.check_no_hooks(model.get_submodule(name), f"model.{name}")

        record = partial(self._record, opened)
        traced = record(model, images)
        check_batch_reads(traced, model, images)
        site = self._site(traced)
        self._check_embedding(traced, site)
        eval_plan = self._mode(traced, site, opened)
        self._check_others(opened)
        taken = self._other_sizes(traced, site, opened)
        in_training = record(model, images, training=True).beside(traced)
        train_plan = self._training_plan(eval_plan, site, in_training, opened)
        flags = {model.training, *(model.get_submodule(name).training for name in opened)}
        if train_plan is not eval_plan and len(flags) > 1:
            raise ArgumentError(
                f"{self.name} is partly in training mode, and its code depends on it: call model.train() or model.eval()"
            )
        example = Example.of(model, images)
        signature = self._signature(site, taken)
        floating, integers = casts_images(traced.graph, model, images, record) if example.follows else (False, False)
        if floating:
            signature = signature.casting(example.like, integers=integers)
        eval_plan, train_plan = self._asking(eval_plan, train_plan, record)
        target = Target(self.options.z, layout, tuple(taken))
        fuses = self.options.fuse and self.options.merge is None  # a reduction looks at attentions itself
        fusing = Fusing(fuse_attention.find_sites(traced.graph, traced.root(model)) if fuses else ())
        plan = Plan(self.name, eval_plan, train_plan, frozenset(opened), example, target, signature, fusing=fusing)
        plan.mode(model.training)  # refuses a mode that cannot be pruned
        return traced.root(model, in_training), plan, [traced.recorded, in_training.recorded]

    def _site(self, traced: Traced) -> TokenSite:
        """The token stream, with the tokens that stand behind its patches."""
        model, images, _ = self.request
        site = prune_tokens.find_site(traced.graph, self.blocks)
        part = cut(traced.scratch_root(model).eval(), traced.graph, site.stream)
        return prune_tokens.find_site(traced.graph, self.blocks, tokens_behind(part, images, site.rows))

    def _check_embedding(self, traced: Traced, site: TokenSite, *, training: bool = False) -> None:
        """Refuses an embedding that cannot embed coarse patches, if there are any."""
        if self.options.coarse:
            model, images, layout = self.request
            coarsen_background.find_site(site, layout)
            part = cut(traced.scratch_root(model).train(training), traced.graph, site.stream)
            check_apart(part, images, site.rows, layout)

    def _record(self, opened: set[str], model: nn.Module, images: Tensor, *, training: bool = False) -> Traced:
        """A trace of the model, or of a copy of it, in which tokens are (B, N, C) somewhere."""
        traced = trace(model, images, lambda _, name: name in opened, training=training)
        for graph in (traced.graph, traced.recorded):
            for blocks in (self.blocks, *self.trunk.others):
                add_batch_first(graph, blocks)
        return traced

    def _asking(
        self, eval_plan: TokenPlan, train_plan: TokenPlan | Refused, record: Callable[..., Traced]
    ) -> tuple[TokenPlan, TokenPlan | Refused]:
        """The plans of both modes for graphs that ask for dtype and device."""
        model, images, _ = self.request
        asking = replace(eval_plan, dense=with_questions(eval_plan.dense, model, images, record))
        if train_plan is eval_plan:
            return asking, asking
        if isinstance(train_plan, TokenPlan):
            dense = with_questions(train_plan.dense, model, images, partial(record, training=True))
            return asking, replace(train_plan, dense=dense)
        return asking, train_plan

    def _check_others(self, opened: set[str]) -> None:
        """Refuses a model with another trunk."""
        if not self.trunk.others:
            return
        wider = opened | ancestors_of(name for names in self.trunk.others for name in names)
        traced = self._record(wider, self.request.model, self.request.images)
        prune_tokens.check_one_trunk(traced.graph, self.blocks, self.trunk.others)

    def _signature(self, site: TokenSite, taken: Sequence[tuple[int, ...]]) -> Signature:
        """How the result is called: with images of any size, of one size, or with as many patches as those."""
        model, images, layout = self.request
        signature = Signature.of(model)
        if not taken:
            return signature.for_size(images.shape, layout)
        same_count = all(prod(shape[1:]) == prod(images.shape[1:]) for shape in taken)
        return signature.for_count(images.shape, layout, site.rows.grid) if same_count else signature

    def _other_sizes(self, traced: Traced, site: TokenSite, opened: set[str]) -> Sequence[tuple[int, ...]]:
        """Shapes of other sizes for which the graph holds, and at which the grid can be read.

        Raises:
            OpenError: The module that flattens the grid must be traced through for that.
        """
        model, images, layout = self.request
        taken = taken_sizes(scratch_copy(model).eval(), lambda: traced.module(model), images, layout)
        readable = prune_tokens.grid_is_readable(site)
        if not taken or (readable and not self.options.coarse):
            return taken
        if counts_follow(cut(traced.module(model), traced.graph, site.stream), images, taken, site.rows, layout):
            return taken
        if readable:  # a patch has another size in other images
            return ()
        join = site.flattening.node
        if join.op == "call_module" and join.target not in opened and self._can_open(opened | {str(join.target)}):
            raise OpenError({str(join.target)}, "its sizes must be values of this graph")
        return ()

    def _can_open(self, opened: set[str]) -> bool:
        """Whether the model can be traced through these modules."""
        try:
            trace(self.request.model, self.request.images, lambda _, name: name in opened)
        except TraceError:
            return False
        return True

    def _mode(self, traced: Traced, site: TokenSite, opened: set[str]) -> TokenPlan:
        """The plan of one mode."""
        root = traced.scratch_root(self.request.model)
        try:
            others = tuple(name for names in self.trunk.others for name in names)
            repairs = gather_positions.find_sites(root, site, self.blocks, self.request.images, others)
        except MixingError:
            raise
        except NoSiteError as error:
            raise NoSiteError(f"{REFUSED.format(self.name)}: {error}") from error
        if self.options.coarse:
            coarsen_background.check_tables(traced.graph, repairs)
        reduced = self._reduced(root, site, repairs)
        left_out = self.attempt.find(self.request, root, site, self.blocks, reduced, opened)
        merge, coarse = self.options.merge, self.options.coarse
        return TokenPlan(traced.graph, self.blocks, site.rows.suffix, repairs, merge, reduced, *left_out, coarse)

    def _reduced(self, root: nn.Module, site: TokenSite, repairs: Repairs) -> ReductionSites:
        """Where `merge` leaves fewer tokens."""
        merge = self.options.merge
        if merge is None or not merge.removes:
            return ReductionSites()
        used = repairs.first_node()
        if used:
            raise NoSiteError(
                f"merge: {self.name} uses positions beyond its embedding (`{used}`), and a merged token has no position"
            )
        found = reduce_tokens.find_sites(root, site, self.blocks, merge, self.request.images)
        targets = {node.name: str(node.target) for node in site.stream.graph.nodes}
        for attention in found.attentions:
            if attention.heads:  # its forward will not be called
                name = targets[attention.node]
                inputs.check_no_hooks(self.request.model.get_submodule(name), f"model.{name}")
        return found

    def _training_plan(self, eval_plan: TokenPlan, site: TokenSite, traced: Traced, opened: set[str]) -> TokenPlan | Refused:
        """The plan for training mode: that for eval mode where the graphs are equal."""
        same = same_graph(traced.graph, eval_plan.dense)
        reason = "" if same else patch_dropout(eval_plan.dense, site.stream, traced.graph)
        if reason:
            return Refused(reason)
        try:
            found = prune_tokens.find_site(traced.graph, self.blocks, site.rows.suffix)
            self._check_embedding(traced, found, training=True)
        except NoSiteError as error:
            return Refused(str(error))
        if same:
            return eval_plan
        if (found.rows, found.block) != (site.rows, site.block):
            return Refused(
                f"in training `{found.block}` reads {found.rows.prefix} prefix tokens and grid {found.rows.grid}, in eval mode "
                f"`{site.block}` reads {site.rows.prefix} and {site.rows.grid}"
            )
        return self._mode(traced, found, opened)

    def _to_open(self, error: OpenError, opened: set[str]) -> set[str]:
        """The modules that a pass asks to trace through.

        Raises:
            NoSiteError: They cannot be traced through.
        """
        model = self.request.model
        kinds = {name: type(model.get_submodule(name)) for name in error.modules}
        containers = {name for name, kind in kinds.items() if kind in (nn.Sequential, nn.ModuleList)}
        closed = error.whole_class and any(kinds[name].__module__.startswith("torch.nn.") for name in kinds.keys() - containers)
        if closed or error.modules & opened:
            reason = f"{REFUSED.format(self.name)}: {error.reason}" if error.whole_class else error.reason
            raise NoSiteError(reason) from error
        if not error.whole_class or containers:
            return error.modules
        alike = {name for name, module in model.named_modules(remove_duplicate=False) if type(module) in kinds.values()}
        return {name for name in alike if any(is_inside(name, block) for block in self.blocks)} | error.modules
