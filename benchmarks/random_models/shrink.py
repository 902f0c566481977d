"""Makes the description of a fault as small as it can be: each field goes back to its plain choice, if the fault stays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

from .judge import Result, judge
from .spec import Spec

_LAST = ("seed", "trunk", "verify")  # these change everything, so they are tried last


def shrink(spec: Spec, result: Result) -> Spec:
    """The smallest description found that fails in the same way."""
    smaller = True
    while smaller:
        smaller = False
        for candidate in _smaller(spec):
            if _same(candidate, result):
                spec, smaller = candidate, True
                break
    return spec


def _same(spec: Spec, result: Result) -> bool:
    """Whether a description fails as the first one did: with the same verdict and the same first word of the reason."""
    try:
        found = judge(spec)
    except (RuntimeError, IndexError, AssertionError, ValueError):  # a combination that no draw gives
        return False
    return found.verdict == result.verdict and found.reason.split(":")[0] == result.reason.split(":")[0]


def _smaller(spec: Spec) -> Iterator[Spec]:
    for trap in spec.traps:
        yield replace(spec, traps=tuple(other for other in spec.traps if other != trap))
    plain = Spec()
    names = [field.name for field in fields(spec) if field.name not in (*_LAST, "traps")]
    for name in (*names, *_LAST):
        if getattr(spec, name) != getattr(plain, name):
            yield replace(spec, **{name: getattr(plain, name)})


def as_code(spec: Spec) -> str:
    """Code that builds the model of a description, and transforms it."""
    return (
        "from benchmarks.random_models.draw import build\n"
        "from benchmarks.random_models.judge import judge\n"
        "from benchmarks.random_models.spec import Spec\n\n"
        f"spec = {spec}\n"
        "model, proposal, images = build(spec)\n"
        "print(judge(spec))"
    )
