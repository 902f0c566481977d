"""The case that all parts of a proof share: a model, its rewritten graph, random images and random parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from ..errors import SiteError, VerifyError
from ..ops import TokenRows
from ..planning.module import PrunedModule, shell
from ..tracing.blocks import is_inside
from ..tracing.fakes import MODEL_ERRORS, aliased_copy, flags_of, set_flags
from ..tracing.numerics import redraw, relative_error, tensors_of
from ..tracing.sources import GraphModule
from ..versions import FakeTensor
from .places import Place, find_place, reorder
from .rewrite import Rewrite

_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}

# Images of the permutation: a gather may mix them up. A batch size that was frozen into the graph shows on one image.
_BATCH = 2


class PrecisionError(VerifyError):
    """The model or its graph does not run in the dtype of the proof, or they differ there: the code may fix a dtype."""


class ComparisonError(SiteError):
    """Two results differ by too much, or by too little where they should differ. In float32 this may be rounding."""


@dataclass(frozen=True, eq=False)
class Case:
    """One rewrite to prove. A run that several parts need is made once, when a part first asks for it.

    Attributes:
        model: What the rewritten graph must agree with, a copy. In training mode see `in_training`.
        root: The modules that the graphs call, in eval mode.
        rewrite: The graphs.
        images: Random images, (B, ...).
        values: Parameters at unit scale, by name.
        random: Draws the orders and the probes.
        own: The graph that the module itself runs, by its mode, if that chooses positions.
        orders: For each choice, all cells of its grid in random order, (B, n).
        probes: For each grid of the streams, the cells where the image is changed.
    """

    model: nn.Module
    root: nn.Module
    rewrite: Rewrite
    images: Tensor
    values: dict[str, Tensor]
    random: torch.Generator
    own: Mapping[bool, fx.Graph] = field(default_factory=dict[bool, fx.Graph])
    orders: tuple[Tensor, ...] = ()
    probes: tuple[tuple[TokenRows, list[int]], ...] = ()

    @classmethod
    def of(cls, model: nn.Module, gm: PrunedModule, dtype: torch.dtype, *, z: float = 0.5, batch: int = _BATCH) -> Case:
        """The case of eval mode, with that many images. `model` and `gm` are left as they are."""
        example = gm.example()
        random = torch.Generator(example.device).manual_seed(0)
        images = torch.randn((batch, *example.shape[1:]), generator=random, device=example.device, dtype=dtype)
        values = redraw(model, random, dtype)
        root = aliased_copy(shell(gm)).eval()
        own = {gm.training: gm.graph} if gm.plan.z < 1 else {}
        return cls(aliased_copy(model).eval(), root, Rewrite(gm.plan, z, False), images, values, random, own)._drawn()

    def in_training(self) -> Case | None:
        """The case of training mode; None where the graph is the same or does not exist.

        Only code that was traced through is in training mode there. Modules that the graph calls stay in eval mode, so that
        their dropout is off.
        """
        if not self.rewrite.differs_in_training:
            return None
        rewrite = replace(self.rewrite, training=True)
        called = {str(node.target) for node in rewrite.dense_graph().find_nodes(op="call_module")}
        model = aliased_copy(self.model)
        opened = {name: not any(is_inside(name, target) for target in called) for name in flags_of(model)}
        set_flags(model, opened)  # a flag for each module: methods besides forward read it too
        random = torch.Generator(self.images.device)
        random.set_state(self.random.get_state())
        return replace(self, model=model, rewrite=rewrite, random=random)._drawn()

    def _drawn(self) -> Case:
        """The same with orders and probes."""
        device, random = self.images.device, self.random
        orders = tuple(
            torch.rand((len(self.images), choice.rows.cells), generator=random, device=device).argsort(dim=1)
            for choice in self.rewrite.choices
        )
        grids = dict.fromkeys(stream.rows for stream in self.rewrite.streams)
        return replace(self, orders=orders, probes=tuple((rows, self._probed(rows)) for rows in grids))

    def _probed(self, rows: TokenRows) -> list[int]:
        count = rows.cells
        some = torch.randint(count, (6,), generator=self.random, device=self.random.device).tolist()
        return sorted({0, count - 1, *some})

    def run(self, module: nn.Module, *inputs: Tensor) -> Any:
        """Calls `module` with the redrawn values of tensors that it shares with the model, others in the images' dtype.

        Raises:
            PrecisionError: It does not run.
            VerifyError: Its code read a fake tensor that it had kept.
        """
        own = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        dtype = self.images.dtype
        given = {name: self.values.get(name, t.to(dtype) if t.is_floating_point() else t) for name, t in own}
        try:
            found = functional_call(module, given, inputs)
        except torch.OutOfMemoryError:  # says nothing about the model
            raise
        except MODEL_ERRORS as error:
            raise PrecisionError(
                f"the proof could not run {type(module).__name__} in {dtype}: {type(error).__name__}: {error}"
            ) from error
        if any(isinstance(tensor, FakeTensor) for tensor in tensors_of(found)):
            raise VerifyError(
                f"{self.rewrite.name} returns a tensor without content: its code keeps tensors between calls, and kept some of "
                "a run that only asked for shapes, where they were not found. Keep them in attributes of the module"
            )
        return found

    def run_pruned(self, kept: Sequence[Tensor], images: Tensor | None = None) -> Any:
        """The rewritten graph's output for b images, the first ones if none are given, with cells (b, k) of each grid kept."""
        images = self.images[: len(kept[0])] if images is None else images
        return self.run(self.pruned, images, *self.indices(kept))

    def indices(self, kept: Sequence[Tensor]) -> list[Tensor]:
        """Cells (b, k) of each grid as indices of positions, (b, prefix + k + suffix)."""
        return [choice.rows.index(cells) for cells, choice in zip(kept, self.rewrite.choices, strict=True)]

    @property
    def tolerance(self) -> float:
        """The relative error that rounding may cause."""
        return _TOLERANCES[self.images.dtype]

    @cached_property
    def dense(self) -> fx.GraphModule:
        """The traced graph."""
        return GraphModule(self.root, self.rewrite.dense_graph())

    @cached_property
    def pruned(self) -> fx.GraphModule:
        """The rewritten graph, with the chosen indices as further inputs."""
        pruned = GraphModule(self.root, self.rewrite.pruned_graph())
        pruned.graph.eliminate_dead_code()
        pruned.recompile()
        return pruned

    @property
    def own_z(self) -> float:
        """The keep ratio of `own_graph`: the module's, or one at which positions are chosen."""
        plan = self.rewrite.plan
        return plan.z if plan.z < 1 else 0.9 if self.rewrite.mode.reduces else self.rewrite.z

    @cached_property
    def own_graph(self) -> fx.Graph:
        """A copy of the graph that the module itself runs in this mode, or would run."""
        graph = self.own.get(self.rewrite.training) or self.rewrite.plan.at(self.own_z).rewrite(self.rewrite.training)
        plain = fx.Graph()
        plain.output(plain.graph_copy(graph, {}))
        return plain

    @cached_property
    def expected(self) -> Any:
        """The model's output."""
        return self.run(self.model, self.images)

    @cached_property
    def expected_first(self) -> Any:
        """The model's output for the first image alone. It is no part of `expected` where tensors have no batch axis."""
        return self.run(self.model, self.images[:1])

    @cached_property
    def kept(self) -> list[Tensor]:
        """Two thirds of each grid's cells in random order, (1, k)."""
        return [cells[:1, : max(1, 2 * cells.shape[1] // 3)] for cells in self.orders]

    @property
    def halves(self) -> list[Tensor]:
        """Two choices for the same image, (2, k) of each grid. Every cell is dropped in one, but one of an odd number.

        Where tokens meet in a maximum, for one, only a choice that drops the largest shows it.
        """
        firsts = [(cells[:1], (cells.shape[1] + 1) // 2) for cells in self.orders]
        return [torch.cat([cells[:, :k], cells[:, -k:]]) for cells, k in firsts]

    @property
    def image_twice(self) -> Tensor:
        """The first image for both of the choices `halves`."""
        return torch.cat([self.images[:1], self.images[:1]])

    @cached_property
    def kept_output(self) -> Any:
        """The rewritten graph's output for the first image with `kept` cells."""
        return self.run_pruned(self.kept)

    @cached_property
    def places(self) -> list[Place | None]:
        """For each tensor of the output, where it holds a value per token; pixel operators write all positions back.

        Raises:
            VerifyError: With fewer tokens an output changes its shape in another way.
        """
        if not self.rewrite.prunes_tokens:
            return [None] * len(tensors_of(self.expected))
        (choice,), kept = self.rewrite.choices, self.kept[0].shape[1]
        try:
            return [
                find_place(dense.shape, pruned.shape, choice.rows, kept)
                for dense, pruned in zip(tensors_of(self.expected_first), tensors_of(self.kept_output), strict=True)
            ]
        except ValueError as error:
            raise VerifyError(f"lengths: {error} with {kept} of {choice.rows.grid} patches kept") from error

    @cached_property
    def permuted(self) -> list[Tensor]:
        """The tensors of the model's output, with values per token in the random order."""
        return reorder(self.expected, self.places, self.orders[0])

    @cached_property
    def noise(self) -> float:
        """The relative error with all positions kept in random order: rounding, if the rewrite is right."""
        return relative_error(self.run_pruned(self.orders), self.permuted)

    @cached_property
    def effects(self) -> list[float | None]:
        """For each choice, how far one wrong position moves the output; None for a grid of one position."""
        return [self._effect(number) for number in range(len(self.orders))]

    def _effect(self, number: int) -> float | None:
        """Replaces a grid's last kept cell by the first that is not, or drops it if it is the only token."""
        wrong, others = [cells.clone() for cells in self.kept], self.orders[number][:1, self.kept[number].shape[1] :]
        if others.numel():
            wrong[number][:, -1] = others[:, 0]
            return relative_error(self.run_pruned(wrong), self.kept_output)
        if self.rewrite.choices[number].layout != "BNC":
            return None  # a convolution does not run without positions
        wrong[number] = wrong[number][:, :0]
        return relative_error(self.run_pruned(wrong), reorder(self.expected_first, self.places, self.orders[0][:1]))

    @property
    def least_effect(self) -> float:
        """The smallest of the effects."""
        return min((effect for effect in self.effects if effect is not None), default=self.tolerance)

    @property
    def allowed(self) -> float:
        """The relative error that is allowed with fewer positions: one wrong position causes more."""
        return min(self.tolerance, self.least_effect)
