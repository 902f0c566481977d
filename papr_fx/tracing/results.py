"""Values of nodes on fake inputs. Where a like node had like inputs before, its value is known."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Hashable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from ..errors import TraceError
from ..versions import FakeTensorMode
from .likeness import form_of, kinds_of_modules

_GROWING = list, dict, set, deque
_FIXED = (type(None), bool, int, float, str, Tensor, torch.dtype, torch.device)


class Result(NamedTuple):
    """What a node gave.

    Attributes:
        value: Its value.
        meta: What else is to be noted in the node's `meta`.
    """

    value: Any
    meta: dict[str, Any]


@dataclass(frozen=True)
class _Session:
    """What runs of copies of one model share.

    Attributes:
        mode: The mode of their fake tensors. It accepts real ones.
        numbers: Numbers of kinds of modules.
        known: Results, by what they follow from.
        changing: Kinds of modules whose calls change what they hold.
        held: Fakes of parameters, by their ids.
    """

    mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))
    numbers: dict[Hashable, int] = field(default_factory=dict)
    known: dict[Hashable, Result] = field(default_factory=dict)
    changing: set[int | None] = field(default_factory=set)
    held: dict[int, Tensor] = field(default_factory=dict)


_session: ContextVar[_Session | None] = ContextVar("_session", default=None)


@contextmanager
def shared_results() -> Generator[None]:
    """Fake runs in the body, of this thread, share what they find."""
    token = _session.set(_Session())
    try:
        yield
    finally:
        _session.reset(token)


def fake_mode() -> FakeTensorMode:
    """The mode for the next fake run."""
    return (_session.get() or _Session()).mode


def fake_of(parameter: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake of a parameter, of this mode. Runs that share results share it too: a mode finds its fakes while they are held."""
    fake = mode.from_tensor(parameter)
    session = _session.get()
    if session is not None and session.mode is mode:
        session.held[id(fake)] = fake
    return fake


class ReshapedError(TraceError):
    """Code changed a shape in place, so that the values of other nodes that share it are wrong."""

    def __init__(self) -> None:
        super().__init__("a shape was changed in place")


class LikeResults:
    """Evaluates nodes of graphs that call the modules of `root`, those of equal blocks once.

    A fake tensor has no content, so one object may be the value of several nodes.

    Args:
        root: The modules.
        recorder: What is noted besides values.
        shares: Whether nodes may share results at all.
    """

    def __init__(self, root: nn.Module, recorder: str, *, shares: bool = True) -> None:
        self._session = _session.get() or _Session()
        self.mode = self._session.mode
        self._modules = dict(root.named_modules(remove_duplicate=False))
        self._kinds = kinds_of_modules(root, self._session.numbers) if shares else {}
        self._recorder = recorder
        self._shares = shares
        self._forms: dict[fx.Node, Hashable] = {}
        self._borrowed: set[fx.Node] = set()

    def of(self, node: fx.Node, values: dict[fx.Node, Any], evaluate: Callable[[], Result]) -> Result:
        """The result of `node`, whose inputs have been noted. It is noted too.

        Args:
            node: The node.
            values: Values of nodes, at least of its inputs.
            evaluate: Computes the result from them.

        Raises:
            ReshapedError: Shared values are wrong. Nothing may be shared in this graph.
        """
        if not self._shares:
            return evaluate()
        key = self._key(node)
        result = self._session.known.get(key)
        if result is None:
            result = self._evaluated(node, key, values, evaluate)
        else:
            self._borrowed.add(node)
        self.note(node, result.value)
        return result

    def note(self, node: fx.Node, value: object) -> None:
        """Notes the value of a node that was not evaluated here."""
        self._forms[node] = form_of(value, {}) if _is_fixed(value) else None

    def _evaluated(self, node: fx.Node, key: Hashable, values: dict[fx.Node, Any], evaluate: Callable[[], Result]) -> Result:
        self._part(node, values)
        module = self._modules.get(str(node.target)) if node.op == "call_module" else None
        before = _state(module)
        result = evaluate()
        for given in node.all_input_nodes:
            if self._forms.get(given) is not None and form_of(values[given], {}) != self._forms[given]:
                self._session.known.clear()  # the changed value may be among them
                raise ReshapedError
        if _state(module) != before:  # its next call may give something else
            self._session.changing.add(self._kinds.get(module) if module else None)
        elif key is not None and _is_fixed(result.value):
            self._session.known[key] = result
        return result

    def _part(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        """Gives the inputs of a node values of their own: code asks `q is k`."""
        seen: set[int] = set()
        for given in node.all_input_nodes:
            value = values.get(given)
            if isinstance(value, Tensor) and id(value) in seen and given in self._borrowed:
                values[given] = value = value.new_empty_strided(value.shape, value.stride())
            seen.add(id(value))

    def _key(self, node: fx.Node) -> Hashable:
        """What the node's result follows from; None if that is not known, as where an input is a list that may change."""
        inputs = [self._forms.get(n) for n in node.all_input_nodes]
        if not node.op.startswith("call") or None in inputs or is_in_place(node):
            return None
        target: Hashable = node.target
        if node.op == "call_module":
            target = self._kinds.get(self._modules[str(node.target)])
            if target is None or target in self._session.changing:
                return None
        return self._recorder, node.op, target, form_of((node.args, node.kwargs), self._forms)


def _state(module: nn.Module | None) -> list[list[tuple[str, int, int]]]:
    """What a module and its children hold, and how much of it, to see whether a call changes it."""
    held = [part for m in (module.modules() if module else ()) for part in (vars(m), m._parameters, m._buffers)]
    return [
        [(name, id(value), len(value) if isinstance(value, _GROWING) else 0) for name, value in part.items()] for part in held
    ]


def is_in_place(node: fx.Node) -> bool:
    """Whether a node calls a method such as `add_`, whose result code may discard."""
    target = str(node.target)
    return node.op == "call_method" and target.endswith("_") and not target.endswith("__")


def _is_fixed(value: object) -> bool:
    """Whether a value stays as it is, and is known by its form: code may add to a list, and read a tensor made of a number."""
    if isinstance(value, tuple):
        return all(_is_fixed(part) for part in cast("tuple[object, ...]", value))
    return isinstance(value, _FIXED) and getattr(value, "constant", None) is None
