"""A model's functions made again, so that they see other names than the functions that every thread runs.

`torch.fx` replaces global names while it traces (`torch.arange`, `math.sqrt`, what `torch.fx.wrap` names), for all threads: one
that serves or compiles a model meanwhile runs into them. Here the names stay. The functions that a trace runs are copies: the
same code over globals of their own, in which a name is looked up in the original globals and then replaced.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, cast

# Called with a namespace, a name and its value there; returns what stands for the value, or the value itself.
Replace = Callable[[dict[str, Any], str, Any], Any]

# Tensors' functions record themselves, and what Python brings along does not call the model's code.
_LEFT_ALONE = sys.stdlib_module_names | {"torch"}
# Where a function of a trace keeps the one that it was made of.
_ORIGINAL = "papr_original"
# Globals that the interpreter reads without asking `__missing__`.
_SEEN_BY_PYTHON = ("__name__", "__package__", "__spec__", "__loader__", "__file__", "__path__", "__warningregistry__")


class OwnNames:
    """Makes functions again over other names.

    Args:
        replace: Replaces the values of global names, and of attributes of Python modules.
        given: Replaces builtins, by name.
    """

    def __init__(self, replace: Replace, given: dict[str, Any]) -> None:
        self._replace = replace
        self._functions: dict[FunctionType, FunctionType] = {}
        self._globals: dict[int, _Globals] = {}
        self._methods: dict[type, dict[str, Any]] = {}
        self._views: dict[ModuleType, ModuleType] = {}
        self._builtins = {**vars(builtins), **given, "super": self._super, "__import__": self._import}

    def function(self, function: FunctionType) -> FunctionType:
        """The same function over other names, and the functions that it closes over too; itself if it is of torch.

        Where it closes over itself it keeps itself: code compares that with what a class holds (`type(self).forward is ...`).
        """
        if not _is_copied(function):
            return function
        if function in self._functions:
            return self._functions[function]
        names = self._globals_of(function.__globals__)
        cells = tuple(CellType() if _holds_other(cell, function) else cell for cell in function.__closure__ or ())
        made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells or None)
        made.__kwdefaults__ = function.__kwdefaults__
        vars(made).update(vars(function), **{_ORIGINAL: function})
        for code in _class_bodies(function.__code__):  # Python looks names up there without asking `__missing__`
            names.update({name: names[name] for name in code.co_names if name in names})
        self._functions[function] = made  # it may be closed over by what it closes over
        for cell, before in zip(cells, function.__closure__ or (), strict=True):
            if cell is not before:
                cell.cell_contents = self.function(before.cell_contents)
        return made

    def methods(self, kind: type) -> dict[str, Any]:
        """The functions of a class and its bases over other names, by name. Those that Python looks up on the type are not."""
        if kind not in self._methods:
            found: dict[str, Any] = {}
            for base in kind.__mro__:
                for name, value in vars(base).items():
                    if not name.startswith("__"):
                        found.setdefault(name, value)
            self._methods[kind] = {name: made for name, value in found.items() if (made := self._made(value)) is not None}
        return self._methods[kind]

    def value(self, names: dict[str, Any], name: str, value: Any) -> Any:
        """What code sees under a global name, or as an attribute of a Python module."""
        replaced = self._replace(names, name, value)
        if replaced is not value:
            return replaced
        if isinstance(value, FunctionType):
            return self.function(value)
        if type(value) is functools.partial and self.value({}, "", value.func) is not value.func:
            return functools.partial(self.value({}, "", value.func), *value.args, **value.keywords)
        if isinstance(value, functools._lru_cache_wrapper):  # a cache would keep what is traced now
            return self.function(inner) if isinstance(inner := value.__wrapped__, FunctionType) else value
        return self.view(value) if isinstance(value, ModuleType) else value

    def view(self, module: ModuleType) -> ModuleType:
        """A Python module, with its attributes as `value` shows them."""
        if isinstance(module, _View) or (module.__name__ not in ("torch", "math") and _package(module.__name__) in _LEFT_ALONE):
            return module
        if module not in self._views:
            self._views[module] = _View(module, self)
        return self._views[module]

    def _globals_of(self, names: dict[str, Any]) -> _Globals:
        if id(names) not in self._globals:
            self._globals[id(names)] = _Globals(names, self)
        return self._globals[id(names)]

    def _made(self, value: object) -> Callable[[Any], Any] | None:
        """From an instance to its method over other names; None for what is no function, or of torch."""
        inner: object = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        if not isinstance(inner, FunctionType) or not _is_copied(inner):
            return None
        made = self.function(inner)
        if isinstance(value, staticmethod):
            return lambda instance: made
        return lambda instance: MethodType(made, type(instance) if isinstance(value, classmethod) else instance)

    def _super(self, *args: Any) -> Any:
        """`super()`, whose methods see the same names."""
        if not args:
            frame = sys._getframe(1)
            args = frame.f_locals["__class__"], frame.f_locals[frame.f_code.co_varnames[0]]
        return _Super(super(*args), self)  # pyright: ignore[reportArgumentType]

    def _import(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self.view(builtins.__import__(name, *args, **kwargs))


class _Globals(dict[str, Any]):
    """Looks each global name up in the original ones. Python asks `__missing__`, as this is no plain dictionary."""

    def __init__(self, names: dict[str, Any], own: OwnNames) -> None:
        names.setdefault("__warningregistry__", {})
        super().__init__({name: names[name] for name in _SEEN_BY_PYTHON if name in names}, __builtins__=own._builtins)
        self._names = names
        self._own = own

    def __missing__(self, name: str) -> Any:
        return self._own.value(self._names, name, self._names[name])

    def __contains__(self, name: object) -> bool:
        return name in self._names or super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default


class _View(ModuleType):
    def __init__(self, module: ModuleType, own: OwnNames) -> None:
        super().__init__(module.__name__)
        vars(self).clear()
        vars(self).update(_papr_module=module, _papr_own=own)

    def __getattr__(self, name: str) -> Any:
        module = vars(self)["_papr_module"]
        return vars(self)["_papr_own"].value(vars(module), name, getattr(module, name))

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["_papr_module"], name, value)


class _Super:
    def __init__(self, real: Any, own: OwnNames) -> None:
        object.__setattr__(self, "_papr", (real, own))

    def __getattribute__(self, name: str) -> Any:
        real, own = object.__getattribute__(self, "_papr")
        value = getattr(real, name)
        if not isinstance(value, MethodType) or not isinstance(value.__func__, FunctionType):
            return value
        return MethodType(own.function(value.__func__), value.__self__)


def original(value: Any) -> Any:
    """The function that a function of a trace was made of, also inside a partial; any other value itself."""
    if type(value) is functools.partial:
        named = {name: original(given) for name, given in value.keywords.items()}
        return functools.partial(original(value.func), *map(original, value.args), **named)
    return getattr(value, _ORIGINAL, value) if isinstance(value, FunctionType) else value


def _class_bodies(code: CodeType) -> Iterator[CodeType]:
    """The code of classes that are defined in a function."""
    for part in code.co_consts:
        if isinstance(part, CodeType):
            if not part.co_flags & inspect.CO_OPTIMIZED:
                yield part
            yield from _class_bodies(part)


def _is_copied(function: FunctionType) -> bool:
    return _package(function.__globals__.get("__name__", "?")) not in _LEFT_ALONE


def _holds_other(cell: CellType, function: FunctionType) -> bool:
    """Whether a function closes over another one, as what a decorator makes does. Other values are shared."""
    try:
        value = cell.cell_contents
    except ValueError:  # empty
        return False
    return isinstance(value, FunctionType) and value is not function and _is_copied(value)


def _package(name: object) -> str:
    return cast(str, name).split(".")[0]
