"""Puts a fault in place, in this process, before the package is imported."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

from .fault import ROOT, Fault


class _Planted(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds one module, and runs it with its fault."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._fault.module:
            return None
        file = ROOT / self._fault.path
        spec = importlib.util.spec_from_file_location(fullname, file, loader=self)  # pyright: ignore[reportArgumentType]
        if spec is not None and file.name == "__init__.py":
            spec.submodule_search_locations = [str(file.parent)]
        return spec

    def get_source(self, fullname: str) -> str:
        return self._fault.applied()

    def exec_module(self, module: ModuleType) -> None:
        code = compile(self._fault.applied(), str(ROOT / self._fault.path), "exec")
        exec(code, module.__dict__)


def plant(fault: Fault | None) -> None:
    """Plants a fault.

    Raises:
        RuntimeError: The package is imported already.
    """
    if any(name == "papr_fx" or name.startswith("papr_fx.") for name in sys.modules):
        raise RuntimeError("a fault can only be planted before papr_fx is imported")
    if fault is not None:
        sys.meta_path.insert(0, _Planted(fault))
