"""Caches that outlive a module: dictionaries and `lru_cache` beside the code of a model.

Code may keep a tensor for each number of tokens, made in its forward. While only shapes are asked for, such a tensor is fake;
while code is traced, it is a node of a graph. A later call with as many tokens would read it. So after each such run, what it
left in caches is removed.
"""

from __future__ import annotations

import functools
import gc
import inspect
import sys
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from types import CellType, FunctionType, ModuleType
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import fx, nn

from ..versions import FakeTensor, FakeTensorMode

_LRU = type(functools.lru_cache(lambda: None))
_DEEPEST = 4  # a cache of caches of tuples of tensors
_SMALL = 16  # code may replace what such a cache holds
# Their modules hold no caches of what a model computes. There are many of them.
_FOREIGN = frozenset({"torch", "builtins", "typing", "numpy", *sys.stdlib_module_names})


@dataclass
class _Cache:
    """A cache, and how large it was when it was last seen without fake tensors."""

    held: object
    size: int = -1

    def clear(self, mode: FakeTensorMode) -> None:
        """Removes fake tensors. A large cache is only looked through if it has grown, a cached function if it has run."""
        if self.size != _size(self.held) or (self.size <= _SMALL and not isinstance(self.held, _LRU)):
            _clear(self.held, mode)
            self.size = _size(self.held)


# By mode, of which each `transform` has one, and by classes of modules.
_known: WeakKeyDictionary[FakeTensorMode, dict[frozenset[type], list[_Cache]]] = WeakKeyDictionary()


def remove_fakes(root: nn.Module, mode: FakeTensorMode) -> None:
    """Removes the fake tensors of a mode from caches that code of the modules of `root` can reach.

    Those are the containers and cached functions among the global names of the files of its classes, and of the functions and
    classes named there: also in attributes of classes, functions and other objects, default arguments and closures.
    """
    kinds = frozenset(type(module) for module in root.modules())
    known = _known.setdefault(mode, {})
    if kinds not in known:
        known[kinds] = [_Cache(held) for held in _caches_beside(kinds)]
    for cache in known[kinds]:
        cache.clear(mode)


def _size(cache: object) -> int:
    if isinstance(cache, _LRU):
        return cache.cache_info().misses
    return len(cache) if isinstance(cache, dict | list | set) else 0


def _caches_beside(classes: Iterable[type]) -> Generator[object]:
    kinds = {kind for of_module in classes for kind in of_module.__mro__ if not _is_foreign(kind)}
    names = {kind.__module__ for kind in kinds}
    found: dict[int, object] = {}
    for name in names:
        found.update((id(value), value) for value in _globals_of(name))
    further = {str(getattr(value, "__module__", "")) for value in found.values() if isinstance(value, FunctionType | _LRU)}
    for name in further - names:
        found.update((id(value), value) for value in _globals_of(name))
    found.update((id(kind), kind) for kind in kinds)
    for value in found.values():
        yield from _held_by(value)


def _globals_of(name: str) -> Iterable[object]:
    return [] if _top(name) in _FOREIGN else list(vars(sys.modules[name]).values()) if name in sys.modules else []


def _is_foreign(value: object) -> bool:
    return _top(str(getattr(value, "__module__", ""))) in _FOREIGN


def _top(name: str) -> str:
    return name.partition(".")[0]


def _held_by(value: object) -> Generator[object]:
    """A cache itself, and those in a class, a function or another object."""
    if isinstance(value, dict | list | set | _LRU):
        yield value
    elif not isinstance(value, type | FunctionType | ModuleType | nn.Module) and not _is_foreign(type(value)):
        yield from (
            part for part in list(getattr(value, "__dict__", {}).values()) if isinstance(part, dict | list | set | _LRU)
        )
    if isinstance(value, type) and not _is_foreign(value):
        for member in list(vars(value).values()):
            yield from _held_by(inspect.unwrap(member.__func__) if isinstance(member, classmethod | staticmethod) else member)
    if isinstance(value, FunctionType):
        contents = [_content(cell) for cell in value.__closure__ or ()]
        for part in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *vars(value).values(), *contents):
            if isinstance(part, dict | list | set | _LRU):
                yield part


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _clear(cache: object, mode: FakeTensorMode, depth: int = _DEEPEST) -> None:
    """Removes what holds fake tensors. A cached function forgets all, as it can forget no single result."""
    if not _holds(cache, mode, depth):
        return
    if isinstance(cache, _LRU):
        cache.cache_clear()
    elif isinstance(cache, dict):
        known = cast("dict[Any, Any]", cache)
        for key, value in list(dict.items(known)):
            if isinstance(value, dict | list | set):
                _clear(value, mode, depth - 1)
            elif isinstance(key, fx.Proxy) or _holds(value, mode, depth - 1):
                dict.pop(known, key, None)
    elif isinstance(cache, list):
        values = cast("list[Any]", cache)
        values[:] = [value for value in values if not _holds(value, mode, depth - 1)]
    elif isinstance(cache, set):
        some = cast("set[Any]", cache)
        some.difference_update([value for value in some if _holds(value, mode, depth - 1)])


def _holds(value: object, mode: FakeTensorMode, depth: int) -> bool:
    """Whether a value is a fake tensor of that mode, a traced value, or a container of such."""
    if isinstance(value, FakeTensor):
        return value.fake_mode is mode
    if isinstance(value, fx.Proxy):
        return True
    if not depth:
        return False
    parts = _parts(value)
    kinds = {kind for kind in set(map(type, parts)) if issubclass(kind, _CONTAINERS)}
    return bool(kinds) and any(_holds(part, mode, depth - 1) for part in parts if type(part) in kinds)


def _parts(value: object) -> list[object]:
    if isinstance(value, dict):
        known = cast("dict[Any, object]", value)
        return [*dict.keys(known), *dict.values(known)]  # a subclass may compute what it lists
    if isinstance(value, list | tuple | set | frozenset):
        return list(cast("list[object]", value))
    return gc.get_referents(value)


# For the collector of garbage an `lru_cache` holds its results.
_CONTAINERS = (FakeTensor, fx.Proxy, dict, list, tuple, set, frozenset, _LRU)
