"""Correctness on the device: the proof, and precisions, modes and devices beside each other.

Weights are random at unit scale, so that a fault shows. Kept positions are compared as sets.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager

import papr_fx
from papr_fx.planning.module import PrunedModule, shell
from papr_fx.proof.rewrite import Rewrite
from papr_fx.tracing.graphs import cut
from papr_fx.tracing.numerics import relative_error, tensors_of

from .device import Device
from .jobs import Job
from .subjects import SUBJECTS, Sight, at_unit_scale, images_for

Row = dict[str, Any]
DTYPES = ("float32", "bfloat16", "float16")
_SHARE = {"float32": 0.999, "bfloat16": 0.9, "float16": 0.97}  # of kept positions that must be the same in another mode
_ERROR = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}  # of outputs, where all kept positions are the same


@dataclass(frozen=True)
class _Result:
    """Kept positions (B, k) of each choice, and outputs."""

    kept: list[Tensor]
    output: list[Tensor]

    def beside(self, other: _Result) -> tuple[float, float | None]:
        """Share of kept positions that both have, and relative error of the images where all are the same, if any are."""
        shares = [_shared(a.cpu(), b.cpu()) for a, b in zip(self.kept, other.kept, strict=True)]
        same = torch.stack([share == 1 for share in shares]).all(0)
        if not bool(same.any()):
            return float(torch.stack(shares).mean()), None
        mine, others = ([t.float().cpu()[same] for t in result.output] for result in (self, other))
        return float(torch.stack(shares).mean()), relative_error(mine, others)


def _shared(a: Tensor, b: Tensor) -> Tensor:
    """Share of indices (B, k) that two choices have in common, (B,)."""
    return (a.unsqueeze(2) == b.unsqueeze(1)).any(2).double().mean(1)


def check(job: Job, device: Device) -> Iterator[Row]:
    """One row for each check of a model in a precision, or of how often it is compiled."""
    with torch.no_grad():
        rows = _recompilations(job, device) if job.what == "recompilations" else _precision(job, device)
        for row in rows:
            yield {"subject": job.subject, **row}


def _precision(job: Job, device: Device) -> Generator[Row]:
    subject, dtype = SUBJECTS[job.subject], cast(torch.dtype, getattr(torch, job.what))
    model = at_unit_scale(subject.build(tiny=job.tiny)).to(device.kind, dtype)
    images = images_for(model, job.batch, tiny=job.tiny)
    exact = dtype == torch.float32
    gm = _sight(job).prune(model, images, subject.z, verify=exact)
    if exact:
        yield {"check": "proof on the device", "ok": True}
    keeps = [node for node in gm.graph.nodes if node.name.startswith("papr_keep")]
    module = cut(gm, gm.graph, *keeps, *gm.graph.output_node().all_input_nodes)

    def run(call: Callable[..., Any], images: Tensor) -> _Result:
        values = [value.clone() for value in tensors_of(call(images))]
        return _Result(values[: len(keeps)], values[len(keeps) :])

    eager = run(module, images)
    with device.no_wait():
        gm(images)
    yield {"check": f"{job.what}: eager does not wait", "ok": True}
    yield _beside_reference(job, gm, images, eager)
    if exact and device.cuda:
        yield _beside_cpu(gm, images, eager)
    for mode in ("compiled", "graphs"):
        torch.compiler.reset()
        before = device.dropped_graphs()
        call = device.compiled(module, mode)
        results = [run(call, images) for _ in range(3)]  # with CUDA graphs: warmed up, recorded, replayed
        with device.no_wait():
            call(images)
        share, error = results[-1].beside(eager)
        dropped = device.dropped_graphs() - before
        ok = share >= _SHARE[job.what] and (error is None or error <= _ERROR[job.what]) and not dropped
        row = {"check": f"{job.what}: {mode} beside eager", "kept alike": share, "error": error}
        yield {**row, "CUDA graphs dropped": dropped, "ok": ok and all(_finite(r) for r in results)}


def _sight(job: Job) -> Sight:
    return Sight().tiny() if job.tiny else Sight()


def _finite(result: _Result) -> bool:
    return all(bool(t.isfinite().all()) for t in result.output)


def _beside_cpu(gm: PrunedModule, images: Tensor, eager: _Result) -> Row:
    """`keep_masks` and outputs in float32, beside the CPU."""
    here = copy.deepcopy(gm).cpu()
    masks = zip(papr_fx.keep_masks(gm, images).values(), papr_fx.keep_masks(here, images.cpu()).values(), strict=True)
    shares = [((a.cpu() & b).sum() / b.sum()).item() for a, b in masks]
    error = relative_error([t.cpu() for t in eager.output], tensors_of(here(images.cpu())))
    share = min(shares)
    ok = share >= _SHARE["float32"] and (error <= _ERROR["float32"] or share < 1)
    return {"check": "float32: device beside CPU", "kept alike": share, "error": error, "ok": ok}


def _beside_reference(job: Job, gm: PrunedModule, images: Tensor, eager: _Result) -> Row:
    """Rounding on given positions beside float32 (that of float32 beside float64), next to the dense model's rounding."""
    wide = torch.float64 if job.what == "float32" else torch.float32
    rewrite = Rewrite(gm.plan, gm.plan.z, False)
    errors: list[float] = []
    reference = copy.deepcopy(gm).to(wide)
    for graph, given in ((rewrite.pruned_graph(), eager.kept), (rewrite.dense_graph(), [])):
        values = [tensors_of(_over(m, graph)(x, *given)) for m, x in ((gm, images), (reference, images.to(wide)))]
        errors.append(relative_error([t.to(wide) for t in values[0]], values[1]))
    own, dense = errors
    share = _Result(eager.kept, []).beside(_Result(_kept(reference, images.to(wide)), []))[0] if job.what != "float32" else None
    ok = own <= 2 * dense + _ERROR[job.what] / 10
    row: Row = {"check": f"{job.what}: rounding beside {str(wide)[6:]}", "error": own, "error of dense": dense, "ok": ok}
    return row | ({} if share is None else {"kept alike": share})


def _over(gm: PrunedModule, graph: fx.Graph) -> fx.GraphModule:
    """A graph over the modules of `gm`, without dead code."""
    module = fx.GraphModule(shell(gm), graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _kept(gm: PrunedModule, images: Tensor) -> list[Tensor]:
    keeps = [node for node in gm.graph.nodes if node.name.startswith("papr_keep")]
    return tensors_of(cut(gm, gm.graph, *keeps)(images))


class _Counting:
    """A backend that counts how often it compiles."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Any:
        self.count += 1
        return cast(Any, aot_eager)(gm, inputs)


class _Both(nn.Module):
    """The dense model beside the proposal: the parts of a pruned model."""

    def __init__(self, model: nn.Module, proposal: nn.Module) -> None:
        super().__init__()
        self.model, self.proposal = model, proposal

    def forward(self, x: Tensor) -> Any:
        return self.model(x), self.proposal(x)


def _recompilations(job: Job, device: Device) -> Generator[Row]:
    """Compilations while batch sizes change: no more than those of the dense model beside the proposal."""
    subject = SUBJECTS[job.subject]
    model = subject.build(tiny=job.tiny).to(device.kind)
    sizes = (1, 2, 3) if job.tiny else (1, 2, 3, 16, 33)
    images = images_for(model, max(sizes), tiny=job.tiny)
    gm = _sight(job).prune(model, images, subject.z)
    counts: list[int] = []
    for module in (gm, _Both(model, gm.papr_proposal)):
        torch.compiler.reset()
        backend = _Counting()
        compiled = torch.compile(module, backend=backend, fullgraph=True)
        for size in sizes:
            compiled(images[:size])
        counts.append(backend.count)
    own, parts = counts
    yield {"check": "compilations over batch sizes", "pruned": own, "dense beside proposal": parts, "ok": own <= parts}
