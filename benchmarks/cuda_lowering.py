"""Models for a CUDA GPU, dense and pruned: kernels, memory traffic, time. `python -m benchmarks.cuda_lowering`.

With a CUDA device the models are compiled with CUDA graphs and timed on it. Without one they are lowered for an H100 (or an
A100, `--arch 80`; see `benchmarks.lowering`): the kernels are checked and counted, and times are estimates by inductor's
roofline. Weights are random.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from tabulate import tabulate
from torch import nn

import papr_fx
from papr_fx.evaluation.timing import median_times
from papr_fx.planning.inputs import example_images
from papr_fx.planning.module import PrunedModule

from .fake_cuda import GPUS
from .lowered import Lowering
from .lowering import Target, lower
from .record import Run, environment, write

# Library calls that dense vision models make, and the choice of positions. All of them can be captured in a CUDA graph.
LIBRARY_CALLS = frozenset(
    {
        "convolution",
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "topk",
    }
)


def faults(lowering: Lowering, calls: Collection[str] = LIBRARY_CALLS) -> list[str]:
    """What would make a lowered model wait, copy or leave its CUDA graph; each fault starts with the name of its check.

    Args:
        lowering: From `lower`.
        calls: Library calls that are allowed.
    """
    found = [f"break: {reason}" for reason in lowering.breaks]
    if lowering.graphs != 1:
        found.append(f"graphs: {lowering.graphs} instead of 1")
    found += [f"cut: {reason}" for reason in lowering.cuts]
    found += [f"sync: {operation}" for operation in lowering.syncs]
    found += [f"copy: {operation}" for operation in lowering.copies]
    found += [f"library call: {call}" for call in lowering.calls if call not in calls]
    return found


def kernel_limit(dense: Lowering, proposal: Lowering, gm: PrunedModule) -> int:
    """Kernels that a pruned model may start: those of both its parts, 12 for the choice, and 2 for each pixel operator."""
    found = papr_fx.report(gm)
    return dense.count + proposal.count + 12 + (2 * len(found.sites) if found.mode == "pixels" else 0)


def estimate(
    name: str,
    z: float,
    choices: Sequence[tuple[str, int]],
    batch: int,
    lowered: Callable[[nn.Module, tuple[int, ...]], Lowering],
) -> list[dict[str, Any]]:
    """One row for each proposal and its image size, of estimated times.

    Args:
        name: Of a timm model.
        z: Keep ratio.
        choices: Names of proposals, and the size of their images in pixels.
        batch: Images.
        lowered: Lowers a module for images of a shape.
    """
    model = timm.create_model(name).eval()
    rows: list[dict[str, Any]] = []
    dense: Lowering | None = None
    for proposal, size in choices:
        gm = prune(model, proposal, z, size)
        shape = (batch, *gm.example().shape[1:])
        dense = dense or lowered(model, shape)
        alone, pruned = lowered(gm.papr_proposal, shape), lowered(gm, shape)
        limit = kernel_limit(dense, alone, gm)
        found = faults(pruned, LIBRARY_CALLS | dense.calls.keys())
        if pruned.count > limit:
            found.append(f"kernels: {pruned.count}, more than {limit}")
        rows.append(
            {
                "model": name,
                "z": z,
                "proposal": f"{proposal} {size}",
                "kernels dense": dense.count,
                "proposal's": alone.count,
                "pruned": pruned.count,
                "limit": limit,
                "GB dense": dense.bytes / 1e9,
                "GB proposal": alone.bytes / 1e9,
                "GB pruned": pruned.bytes / 1e9,
                "ms dense": dense.ms,
                "ms proposal": alone.ms,
                "ms pruned": pruned.ms,
                "speed-up": dense.ms / pruned.ms,
                "speed-up by inductor's figures": dense.roofline_ms / pruned.roofline_ms,
                "Triton kernels compiled": len(pruned.kernels),
                "faults": "; ".join(found) or "none",
            }
        )
    return rows


def measure(name: str, z: float, choices: Sequence[tuple[str, int]], run: Run, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The same rows with measured times: compiled with CUDA graphs, all variants of a model take turns."""
    model = timm.create_model(name).eval().to(run.device, dtype)
    pruned = {(proposal, size): prune(model, proposal, z, size) for proposal, size in choices}
    variants: dict[str, nn.Module] = {"dense": model}
    for (proposal, size), gm in pruned.items():
        variants[f"{proposal} {size}"] = gm
        variants[f"{proposal} {size} alone"] = gm.papr_proposal
    images = torch.randn(run.batch, *next(iter(pruned.values())).example().shape[1:], device=run.device, dtype=dtype)
    torch.compiler.reset()

    def call(module: nn.Module) -> Callable[[], Any]:
        compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True, dynamic=False)

        def step() -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(images)

        return step

    calls = {key: call(module) for key, module in variants.items()}
    times = median_times(calls, rounds=run.rounds, warmup=4)  # compiled, warmed up, recorded, and replayed once
    return [
        {
            "model": name,
            "z": z,
            "proposal": f"{proposal} {size}",
            "ms dense": times["dense"],
            "ms proposal": times[f"{proposal} {size} alone"],
            "ms pruned": times[f"{proposal} {size}"],
            "speed-up": times["dense"] / times[f"{proposal} {size}"],
        }
        for proposal, size in choices
    ]


def prune(model: nn.Module, proposal: str, z: float, size: int) -> PrunedModule:
    """Transforms `model` with a proposal of random weights that sees images of `size` pixels."""
    rows = example_images(model, None).shape[-2]
    return papr_fx.transform(model, timm.create_model(proposal), z, proposal_size=None if size == rows else size, verify=False)


def main() -> None:
    """Prints the table and writes out/cuda_lowering.json; fails if a check does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_base_patch16_224", "convnext_base"])
    parser.add_argument("--z", nargs="+", type=float, default=[0.5, 0.65], help="one, or one for each model")
    parser.add_argument("--proposal", nargs="+", default=["mobileone_s0"])
    parser.add_argument("--proposal-size", nargs="+", type=int, default=[160], help="pixels")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--arch", type=int, choices=sorted(GPUS), default=90, help="without a CUDA device")
    parser.add_argument(
        "--flash", action=argparse.BooleanOptionalAction, default=True, help="flash attention, without a CUDA device"
    )
    parser.add_argument(
        "--compile-kernels", action=argparse.BooleanOptionalAction, default=True, help="to machine code, without a CUDA device"
    )
    parser.add_argument("--rounds", type=int, default=21, help="with a CUDA device")
    parser.add_argument("--out", type=Path, default=Path("out/cuda_lowering.json"))
    arguments = parser.parse_args()
    ratios = arguments.z * len(arguments.models) if len(arguments.z) == 1 else arguments.z
    if len(ratios) != len(arguments.models):
        parser.error(f"--z: {len(ratios)} keep ratios for {len(arguments.models)} models")
    torch.manual_seed(0)
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    choices = [(proposal, size) for proposal in arguments.proposal for size in arguments.proposal_size]
    here = torch.cuda.is_available()
    target = Target(GPUS[arguments.arch], dtype, flash=arguments.flash, compile_kernels=arguments.compile_kernels)
    run = Run(arguments.batch, arguments.rounds, torch.device("cuda"), compiled=True)

    def lowered(module: nn.Module, shape: tuple[int, ...]) -> Lowering:
        return lower(module, shape, target)

    rows: list[dict[str, Any]] = []
    for name, z in zip(arguments.models, ratios, strict=True):
        if here:
            rows += measure(name, z, choices, run, dtype)
        else:
            rows += estimate(name, z, choices, arguments.batch, lowered)
    title = "measured, CUDA graphs" if here else f"lowered for {target.gpu.name}, estimated times, nothing was run"
    print(f"batch {arguments.batch}, {arguments.dtype}, {title}; {environment(0)}\n")
    print(tabulate(rows, headers="keys", floatfmt=".2f", tablefmt="github"))
    write(arguments.out, rows, seed=0)
    wrong = [row for row in rows if row.get("faults", "none") != "none"]
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(rows)} rows have faults")


if __name__ == "__main__":
    main()
