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
_SHARE = {"float32": 0.99, "bfloat16": 0.85, "float16": 0.95}  # of kept positions that must be the same in another mode
_ERROR = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.01}  # of outputs on the same positions


@dataclass(frozen=True)
class _Result:
    """Kept positions (B, k) of each choice, and outputs."""

    kept: list[Tensor]
    output: list[Tensor]

    @classmethod
    def of(cls, call: Callable[..., Any], *inputs: Tensor) -> _Result:
        """What a graph of `_told` returns."""
        values = [value.clone() for value in tensors_of(call(*inputs))]
        kept = sum(not value.is_floating_point() for value in values)
        return cls(values[:kept], values[kept:])

    def beside(self, other: _Result, *, every: bool) -> tuple[float, float | None]:
        """Share of kept positions that both have, and relative error of outputs.

        Of every image, or of those where all kept positions are the same; None if there is no such image.
        """
        shares = [_shared(a.cpu(), b.cpu()) for a, b in zip(self.kept, other.kept, strict=True)]
        same = torch.stack([share == 1 for share in shares]).all(0) | every
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
    eager = _Result.of(_told(gm, gm.graph), images)
    wait = device.waits(lambda: gm(images))
    row = {"check": f"{job.what}: eager does not wait", "waits": wait}
    yield {**row, "ok": not wait or bool(device.waits(lambda: model(images)))}
    yield (rounding := _rounding(job, gm, images, eager))
    if exact:
        yield _beside_cpu(gm, images, eager)
    limit = max(_ERROR[job.what], 3 * rounding["error"])
    # In half precision near ties fall otherwise in another mode: outputs are compared on positions that are given.
    module = _told(gm, gm.graph if exact else Rewrite(gm.plan, gm.plan.z, False).pruned_graph())
    inputs = (images,) if exact else (images, *eager.kept)
    for mode in ("graphs", "compiled"):
        torch.compiler.reset()
        before = device.dropped_graphs()
        call = device.compiled(module, mode)
        results = [_Result.of(call, *inputs) for _ in range(3)]  # with CUDA graphs: warmed up, recorded, replayed
        wait = device.waits(lambda call=call: call(*inputs))
        share, error = results[-1].beside(eager, every=not exact)
        dropped = device.dropped_graphs() - before
        ok = share >= _SHARE[job.what] and (error is None or error <= limit) and not dropped and not wait
        row = {"check": f"{job.what}: {mode} beside eager", "kept alike": share, "error": error, "waits": wait}
        yield {**row, "CUDA graphs dropped": dropped, "ok": ok and all(_finite(result) for result in results)}


def _told(gm: PrunedModule, graph: fx.Graph) -> fx.GraphModule:
    """The graph with the kept positions of each choice as further outputs, before the model's own."""
    keeps = [node for node in graph.nodes if node.name.startswith("papr_keep")]
    return cut(shell(gm), graph, *keeps, *graph.output_node().all_input_nodes)


def _sight(job: Job) -> Sight:
    return Sight().tiny() if job.tiny else Sight()


def _finite(result: _Result) -> bool:
    return all(bool(t.isfinite().all()) for t in result.output)


def _beside_cpu(gm: PrunedModule, images: Tensor, eager: _Result) -> Row:
    """`keep_masks` and outputs in float32, beside the CPU."""
    here = copy.deepcopy(gm).cpu()
    masks = zip(papr_fx.keep_masks(gm, images).values(), papr_fx.keep_masks(here, images.cpu()).values(), strict=True)
    shares = [((a.cpu() & b).sum() / b.sum()).item() for a, b in masks]
    error = eager.beside(_Result.of(_told(here, here.graph), images.cpu()), every=False)[1]
    ok = min(shares) >= _SHARE["float32"] and (error is None or error <= _ERROR["float32"])
    return {"check": "float32: device beside CPU", "kept alike": min(shares), "error": error, "ok": ok}


def _rounding(job: Job, gm: PrunedModule, images: Tensor, eager: _Result) -> Row:
    """Rounding on given positions beside float32 (that of float32 beside float64), next to the dense model's rounding."""
    wide = torch.float64 if job.what == "float32" else torch.float32
    rewrite = Rewrite(gm.plan, gm.plan.z, False)
    errors: list[float] = []
    reference = copy.deepcopy(gm).to(wide)
    for graph, given in ((rewrite.pruned_graph(), eager.kept), (rewrite.dense_graph(), [])):
        values = [tensors_of(_over(m, graph)(x, *given)) for m, x in ((gm, images), (reference, images.to(wide)))]
        errors.append(relative_error([t.to(wide) for t in values[0]], values[1]))
    own, dense = errors
    share, _ = eager.beside(_Result.of(_told(reference, reference.graph), images.to(wide)), every=True)
    ok = own <= 2 * dense + _ERROR[job.what] / 10
    check = f"{job.what}: rounding beside {str(wide).removeprefix('torch.')}"
    return {"check": check, "kept alike": share, "error": own, "error of dense": dense, "ok": ok}


def _over(gm: PrunedModule, graph: fx.Graph) -> fx.GraphModule:
    """A graph over the modules of `gm`, without dead code."""
    module = fx.GraphModule(shell(gm), graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


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
