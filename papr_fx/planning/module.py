"""The module that `transform` returns: a GraphModule whose keep ratio can be changed in place."""

from __future__ import annotations

import copy
from collections.abc import Collection
from numbers import Real
from types import FunctionType
from typing import Any, cast

from torch import Tensor, fx, nn
from torch.fx.graph import PythonCode

from ..errors import ArgumentError, NoSiteError, TraceError
from ..passes.reduction import Reduction
from ..proposals.network import SignificanceNet
from ..tracing.fakes import flags_of, scratch_copy, set_flags
from ..tracing.graphs import propagate, remove_dead_code
from ..tracing.offloaded import is_offloaded, leave_without_content
from ..tracing.sources import GraphModule
from .attributes import add_class_attributes, flags_by_mode, importable, plain_attributes
from .code import CALLS, Compiled, OwnLock, code_class, forward_of_others, put
from .modes import PixelPlan
from .plan import Plan
from .unheard import warn_of_hooks


class PrunedModule(GraphModule):
    """A rewritten model: its own modules and tensors, the proposal under `papr_proposal`, and the `plan` it follows.

    Any thread may change the keep ratio or copy the module while others call it: a call runs at one ratio from start to end.

    Tensors are shared with the original model, module objects are not: `train()` and `eval()` here change nothing there, while
    an optimiser step or `.to()` acts on both.
    """

    plan: Plan
    papr_proposal: SignificanceNet
    _written: FunctionType

    def __init__(self, root: nn.Module, plan: Plan) -> None:
        """Builds the graph that `plan` describes over the modules of `root`, which holds `papr_proposal`."""
        flags, by_mode = flags_of(root), flags_by_mode(root)
        set_flags(root, flags)
        super().__init__(root, plan.signature.on(plan.rewrite(root.training)), plan.name)
        self._modules = dict(root._modules)  # all of them, where GraphModule copies only what its graph calls
        self._parameters.update(root._parameters)
        self._buffers.update(root._buffers)
        constants = set(self._buffers) - set(root._buffers)  # plain tensors of the model, not part of its state
        self._non_persistent_buffers_set = set(root._non_persistent_buffers_set) | constants
        self.plan = plan
        self._model_flags = by_mode
        self._compiled: dict[tuple[float, bool], Compiled] = {}
        self._changing = OwnLock()
        remove_dead_code(self.graph)  # dense values that kept ones replace
        propagate(self.for_shapes(), self.graph, self.example())
        self.recompile()
        self._compiled[plan.z, root.training] = Compiled.of(self)
        self._model_class = type(root)
        warn_of_hooks(self, plan.unheard)
        own = {name: value for name, value in plain_attributes(root).items() if not hasattr(self, name)}
        self.__setstate__(own)

    def example(self) -> Tensor:
        """Uninitialised images of the traced shape, in the dtype that the model now takes and on its device."""
        images = self.plan.example.images(self)
        return images.to("meta") if is_offloaded(self) else images

    def retarget(self, z: float) -> None:
        """Rewrites the graph for keep ratio `z`, in place.

        Raises:
            NoSiteError: The model does not run on so few positions. The module stays as it is.
        """
        with self._changing:
            try:
                self._follow(self.plan.at(z), self.training)
            except TraceError as error:
                left = ", ".join(f"{choice.kept(z)} of {choice.rows.count}" for choice in self.plan.choices(self.training))
                raise NoSiteError(
                    f"{self.plan.name} does not run at z={z:g}, where {left} positions are left: "
                    f"{str(error).splitlines()[0]}. The keep ratio stays {self.plan.z:g}"
                ) from error

    def leave_dense(self, additions: Collection[str], reason: str) -> bool:
        """Makes the pixel operators that feed `additions` dense again. False, without a change, if no other would be left."""
        plan = self.plan.without(additions, reason)
        mode = plan.mode(self.training)
        if not isinstance(mode, PixelPlan) or not mode.sites:
            return False
        self.follow(plan)
        return True

    def follow(self, plan: Plan) -> None:
        """Rewrites the graph as another plan says, in place."""
        with self._changing:
            self._compiled = {}  # they follow the old plan
            self._follow(plan, self.training)

    def train(self, mode: bool = True) -> PrunedModule:
        """Sets training mode, with the graph that was traced for it. The proposal stays in eval mode.

        Where the model's class has a `train` of its own, such as one that keeps a part frozen, flags are those that it sets.
        """
        flags = self._model_flags.get(mode, {})
        training = flags.get("", mode)
        with self._changing:
            if training != self.training and not self.plan.one_graph:
                self._follow(self.plan, training)
            super().train(training)
            set_flags(self, flags)
        return self

    def recompile(self) -> PythonCode:
        """Makes the code of the graph. A `forward` that others hold, as wrappers of it do, runs the new code too."""
        owner = code_class(self)
        others = forward_of_others(owner)
        code = super().recompile()
        written = cast(FunctionType, vars(type(self))["forward"])
        if owner is not type(self):  # what `fx` gives to a class above would call itself
            for name in ("forward", *CALLS):
                delattr(type(self), name)
        put(owner, written, others)
        return code

    def _follow(self, plan: Plan, training: bool) -> None:
        """Puts the graph of `plan` in place, once it is known to run. One of the last graphs keeps its code.

        So `torch.compile` finds what it compiled for that code.
        """
        known = self._compiled.pop((plan.z, training), None)
        if known is None:
            self.graph = plan.signature.on(self._runnable(plan.rewrite(training)))
            known = Compiled.of(self)
        else:
            known.restore(self)
        self._compiled[plan.z, training] = known  # the last one now
        for oldest in [*self._compiled][:-_KEPT_GRAPHS]:  # who follows a load sets ever new ratios
            del self._compiled[oldest]
        self.plan = plan

    def _runnable(self, graph: fx.Graph) -> fx.Graph:
        """The graph over these modules, without dead code and with shapes; `TraceError` if it does not run."""
        cleaned = GraphModule(self, graph).graph  # whether code is dead is asked of the graph's module
        remove_dead_code(cleaned)
        propagate(self.for_shapes(), cleaned, self.example())
        return cleaned

    def for_shapes(self) -> nn.Module:
        """A copy of the modules to run on fake tensors."""
        root = scratch_copy(shell(self))
        if is_offloaded(self):  # the proposal keeps its weights; for shapes only, it follows the model
            leave_without_content(root)
        return root

    def __deepcopy__(self, memo: dict[int, Any]) -> PrunedModule:
        with self._changing:
            return self._deep_copied(memo)

    def _deep_copied(self, memo: dict[int, Any]) -> PrunedModule:
        Compiled.of(self).restore(self)  # a wrapper of `forward` is shared with the copy, and then asks each for its own
        copied = PrunedModule.__new__(PrunedModule)
        memo[id(self)] = copied  # hooks may refer to it
        root = copy.deepcopy(shell(self), memo)
        set_flags(root, flags_of(self))
        PrunedModule.__init__(copied, root, self.plan)
        copied.__setstate__(copy.deepcopy(self._state(), memo))
        if others := forward_of_others(code_class(self)):
            code_class(copied).forward = copy.deepcopy(others, memo)
        return copied

    def __copy__(self) -> PrunedModule:
        with self._changing:
            Compiled.of(self).restore(self)
            copied = PrunedModule(shell(self), self.plan)
            own = {name: copy.copy(value) if name in _HOOKS else value for name, value in self._state().items()}
            copied.__setstate__(own)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        with self._changing:
            state = {**self._state(), "_model_class": importable(self._model_class)}
            return PrunedModule, (shell(self), self.plan), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Adds attributes to those that the constructor made, and what the model's class defines."""
        vars(self).update(state)
        add_class_attributes(type(self), self._model_class)

    def _state(self) -> dict[str, Any]:
        """All that copies must keep and the constructor does not make: attributes, hooks, `meta`."""
        return {name: value for name, value in vars(self).items() if name not in _BUILT}


_KEPT_GRAPHS = 16

# What the constructor makes.
_BUILT = frozenset(
    {"training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "plan", "_compiled", "_changing"}
    | {"_graph", "_code", "_lineno_map", "_prologue_start", "_tracer_cls", "_tracer_extras"}
)
_HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith(("_hooks", "_with_kwargs", "_always_called")))


def shell(gm: PrunedModule) -> nn.Module:
    """A plain module with the children and tensors of `gm`, from which another one can be built."""
    root = nn.Module()
    root.training = gm.training
    root._modules.update(gm._modules)
    root._parameters.update(gm._parameters)
    root._buffers.update(gm._buffers)
    root._non_persistent_buffers_set = set(gm._non_persistent_buffers_set)
    return root


def sibling(
    gm: PrunedModule, *, z: float | None = None, reduction: Reduction | None = None, narrow: bool = True
) -> PrunedModule:
    """Another module over the same children and tensors, with another keep ratio or reduction, or with all rows computed.

    `gm` stays as it is.
    """
    plan = gm.plan if z is None else gm.plan.at(z)
    plan = plan if narrow else plan.computing_all_rows()
    return PrunedModule(shell(gm), plan if reduction is None else plan.reducing(reduction))


def set_keep_ratio(gm: fx.GraphModule, z: float) -> None:
    """Changes the keep ratio of a transformed module in place. At 1.0 its graph is the dense model's.

    A module that was given to `torch.compile` is compiled again at its next call. A compiled module that only contains `gm` is
    not: it goes on with the old ratio until it is compiled again (`torch.compiler.reset()`).

    Args:
        gm: A module returned by `transform`.
        z: Share of the tokens to keep, in (0, 1].

    Raises:
        ArgumentError: `gm` was not transformed, or `z` is out of range.
    """
    checked_module(gm).retarget(checked_z(z))


def checked_z(z: object) -> float:
    """Returns keep ratio `z` as a float, or raises `ArgumentError` unless it is a real number in (0, 1]."""
    if isinstance(z, bool) or not isinstance(z, Real):
        raise ArgumentError(f"z (the share of tokens kept) must be a number in (0, 1], not {z!r} ({type(z).__name__})")
    if not 0 < cast(float, z) <= 1:
        raise ArgumentError(f"z (the share of tokens kept) must lie in (0, 1], not {z!r}; z=0.5 keeps half of the tokens")
    return float(z)


def checked_module(gm: object) -> PrunedModule:
    """Returns `gm`, or raises `ArgumentError` if it is not a transformed module."""
    if isinstance(gm, PrunedModule):
        return gm
    hint = "; pass the module that was given to torch.compile" if hasattr(gm, "_orig_mod") else ""
    raise ArgumentError(f"sought a module returned by papr_fx.transform(), found {type(gm).__name__}{hint}")
