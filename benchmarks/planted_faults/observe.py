"""What a model does once it is transformed: all that a user can see of it, as numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.subjects import Subject

# Relative. Results in float64 differ by far less where nothing is wrong.
_TOLERANCE = 1e-6


@dataclass
class Seen:
    """What was seen of one model.

    Attributes:
        refused: The class of the error by which it was refused; empty if it was not.
        expected: Whether that is one of the package's own errors.
        parts: Tensors, or the class of an error, by what was done.
        module: The result.
    """

    refused: str = ""
    expected: bool = True
    parts: dict[str, list[Tensor] | str] = field(default_factory=dict[str, "list[Tensor] | str"])
    module: nn.Module | None = None

    def unlike(self, other: Seen) -> list[str]:
        """In what the two differ."""
        if self.refused or other.refused:
            return [] if self.refused == other.refused else ["refusal"]
        return [name for name in other.parts if not _alike(self.parts[name], other.parts[name])]


def transformed(subject: Subject, *, verify: bool) -> Seen:
    """Transforms a model, and notes what it then does."""
    import papr_fx

    model = subject.built()
    options: dict[str, Any] = {name: value(papr_fx) if callable(value) else value for name, value in subject.options.items()}
    example = torch.zeros((1, *subject.shape), dtype=torch.float64)
    proposal = subject.proposal()
    proposal = proposal.double() if proposal is not None else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            gm = papr_fx.transform(model, proposal, subject.z, example_input=example, verify=verify, **options)
        except Exception as error:  # whatever a fault raises
            return Seen(type(error).__name__, isinstance(error, papr_fx.PaprError))
        return Seen(parts=_parts(subject, gm, papr_fx), module=gm)


def _parts(subject: Subject, gm: nn.Module, papr_fx: Any) -> dict[str, list[Tensor] | str]:
    random = torch.Generator().manual_seed(0)

    def images(batch: int, shape: tuple[int, ...] = subject.shape) -> Tensor:
        return torch.randn((batch, *shape), generator=random, dtype=torch.float64)

    x, more = images(2), images(3)
    found: dict[str, list[Tensor] | str] = {}

    def note(name: str, run: Callable[[], Any]) -> None:
        try:
            with torch.no_grad():
                found[name] = _tensors(run())
        except Exception as error:  # as above
            found[name] = type(error).__name__

    note("output", lambda: gm(x))
    note("three images", lambda: gm(more))
    note("kept", lambda: list(papr_fx.keep_masks(gm, x).values()))
    note("token map", lambda: papr_fx.token_map(gm, x))
    note("report", lambda: _numbers(papr_fx.report(gm)))
    note("hooks", lambda: _hooked(gm, x))
    if subject.sizes:
        other = images(2, subject.sizes)
        note("other size", lambda: gm(other))

    def training() -> Any:
        gm.train()
        for module in gm.modules():
            if isinstance(module, nn.Dropout):
                module.eval()  # rows that are left out draw no numbers
        return gm(x)

    note("training mode", training)
    gm.eval()
    note("eval mode again", lambda: gm(x))
    note("dropout by itself", lambda: torch.tensor(_drops(gm, x)))
    gm.eval()

    def at(z: float) -> Any:
        papr_fx.set_keep_ratio(gm, z)
        return gm(x)

    note("another keep ratio", lambda: at(0.7))
    note("all kept", lambda: at(1.0))
    note("the keep ratio again", lambda: at(subject.z))
    note("too large a keep ratio", lambda: at(1.5))
    note("another shape", lambda: gm(images(2, (*subject.shape[:-1], subject.shape[-1] + 1))))
    note("state", lambda: [torch.tensor(len(gm.state_dict()))])
    return found


def _drops(gm: nn.Module, x: Tensor) -> bool:
    """Whether two calls in eval mode give unlike results once dropout alone is switched on."""
    for module in gm.modules():
        module.train(isinstance(module, nn.Dropout))
    return not _alike(_tensors(gm(x)), _tensors(gm(x)))


def _numbers(report: Any) -> list[Tensor]:
    """How many positions there are at each site, and how many are kept; what is rewritten besides; and the work."""
    sites = [[site.dense, site.kept, site.prefix, site.suffix] for site in report.sites]
    besides = [*(report.narrowed or ("", 0, 0))[1:], bool(report.embedding), report.fused, len(report.reduced)]
    return [torch.tensor(sites), torch.tensor([*besides, report.pruned_macs])]


def _hooked(gm: nn.Module, x: Tensor) -> Any:
    """The result with a hook on each layer."""
    layers = [module for module in gm.modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)]
    hooks = [layer.register_forward_hook(_larger) for layer in layers]
    try:
        return gm(x)
    finally:
        for hook in hooks:
            hook.remove()


def _larger(layer: nn.Module, given: Any, out: Any) -> Any:
    """A hook that changes what a layer returns."""
    return out * 1.5


def _tensors(value: Any) -> list[Tensor]:
    from papr_fx.tracing.numerics import tensors_of

    return [tensor.detach().double() if tensor.is_floating_point() else tensor for tensor in tensors_of(value)]


def _alike(one: list[Tensor] | str, other: list[Tensor] | str) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    if [t.shape for t in one] != [t.shape for t in other]:
        return False
    return all(_near(a.double(), b.double()) for a, b in zip(one, other, strict=True))


def _near(a: Tensor, b: Tensor) -> bool:
    if not a.numel():
        return True
    scale = b.abs().amax().clamp(min=1e-30)
    return bool((a - b).abs().amax() <= _TOLERANCE * scale)
