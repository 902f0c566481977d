"""Values of nodes on fake inputs. Where a like node had like inputs before, its value is known."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from ..versions import FakeTensorMode
from .likeness import form_of, kinds_of_modules

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
        known: Results and the forms of their values, by what they follow from.
    """

    mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))
    numbers: dict[Hashable, int] = field(default_factory=dict)
    known: dict[Hashable, tuple[Result, Hashable]] = field(default_factory=dict)


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


class LikeResults:
    """Evaluates nodes of graphs that call the modules of `root`, those of equal blocks once.

    A fake tensor has no content, so one object may be the value of several nodes.
    """

    def __init__(self, root: nn.Module) -> None:
        session = _session.get() or _Session()
        kinds = kinds_of_modules(root, session.numbers)
        self._kinds = {name: kinds.get(module, module) for name, module in root.named_modules(remove_duplicate=False)}
        self._forms: dict[fx.Node, Hashable] = {}
        self._known = session.known

    def of(self, node: fx.Node, evaluate: Callable[[], Result]) -> Result:
        """The result of `node`, whose inputs have been noted. It is noted too."""
        key = self._key(node)
        result, form = self._known.get(key, (None, None))
        if result is None or form != form_of(result.value, {}):  # a method may have changed its shape in place
            result = evaluate()
            form = form_of(result.value, {})
            if key is not None and _is_fixed(result.value):
                self._known[key] = result, form
        self._forms[node] = form if _is_fixed(result.value) else None
        return result

    def note(self, node: fx.Node, value: object) -> None:
        """Notes the value of a node that was not evaluated here."""
        self._forms[node] = form_of(value, {}) if _is_fixed(value) else None

    def _key(self, node: fx.Node) -> Hashable:
        """What the node's result follows from; None if that is not known, as where an input is a list that may change."""
        inputs = [self._forms.get(n) for n in node.all_input_nodes]
        if not node.op.startswith("call") or None in inputs or is_in_place(node):
            return None
        target = self._kinds.get(str(node.target), node.target) if node.op == "call_module" else node.target
        return node.op, target, form_of((node.args, node.kwargs), self._forms)


def is_in_place(node: fx.Node) -> bool:
    """Whether a node calls a method such as `add_`, whose result code may discard."""
    return node.op == "call_method" and changes_its_tensor(str(node.target))


def changes_its_tensor(method: str) -> bool:
    """Whether a method of that name works in place."""
    return method.endswith("_") and not method.endswith("__")


def call_method(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a method of a fake tensor. One such as `unsqueeze_` changes a copy: the tensor may be the value of other nodes."""
    called, *rest = args
    if changes_its_tensor(name) and isinstance(called, Tensor):
        called = called.new_empty_strided(called.shape, called.stride())
    return getattr(called, name)(*rest, **kwargs)


def _is_fixed(value: object) -> bool:
    """Whether a value stays as it is: code may add to a list."""
    if isinstance(value, tuple):
        return all(_is_fixed(part) for part in cast("tuple[object, ...]", value))
    return isinstance(value, _FIXED)
