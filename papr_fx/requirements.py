"""The oldest versions that papr-fx runs on.

`papr_fx` imports this module first, which reads what is installed and refuses older versions. Otherwise their own code, or that
of a newer library on them, would fail in words that do not name the cause. So nothing is imported here but the errors.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Mapping

from .errors import VersionError

# pyproject.toml and constraints-oldest.txt say the same. The suite was run on these.
OLDEST: Mapping[str, str] = {"Python": "3.10", "torch": "2.9", "timm": "1.0.20"}


def check_versions(found: Mapping[str, str | None]) -> None:
    """Refuses versions below `OLDEST`. A pre-release counts as its release.

    Args:
        found: What is installed, by the names of `OLDEST`; None for what is not.

    Raises:
        VersionError: Something is older, or missing.
    """
    old = {name: oldest for name, oldest in OLDEST.items() if _release(found[name] or "") < _release(oldest)}
    if not old:
        return
    needed = ", ".join(f"{name}>={oldest}" for name, oldest in old.items())
    seen = ", ".join(f"{name} {found[name]}" if found[name] else f"no {name}" for name in old)
    packages = " ".join(f'"{name}>={oldest}"' for name, oldest in old.items() if name != "Python")
    fixes = [f"make an environment with Python {OLDEST['Python']} or newer"] if "Python" in old else []
    fixes += [f"pip install -U {packages}"] if packages else []
    raise VersionError(f"papr_fx needs {needed}; found {seen}; the fix: {', and there '.join(fixes)}")


def _release(version: str) -> tuple[int, ...]:
    """The numbers that a version starts with: (2, 9, 1) of "2.9.1+cu128"."""
    digits = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, digits[0].split("."))) if digits else ()


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


check_versions({"Python": platform.python_version(), "torch": _installed("torch"), "timm": _installed("timm")})
