"""Training steps dense and pruned: time, and MACs of a step. `python -m benchmarks.training`.

A step is forward, backward and an AdamW update. Backward costs twice the MACs of forward; the proposal runs forward only.
The paper trains DeiT-S (`deit_small_patch16_224`); its accuracy needs ImageNet: see docs/training.md.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn

import papr_fx
from papr_fx.evaluation.models import VIDEO_MODELS, video_model
from papr_fx.evaluation.timing import median_times
from papr_fx.tracing.numerics import tensors_of

from .record import Run, environment, write

MODELS = {
    "deit_small_patch16_224": 0.5,
    "vit_base_patch16_224": 0.5,
    "convnext_tiny": 0.65,
    "swin_tiny_patch4_window7_224": 0.65,
}
PROPOSAL = "mobileone_s0"


def step_of(module: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, compiled: bool) -> Callable[[], None]:
    """One training step of a module."""
    run: Any = torch.compile(module, fullgraph=True) if compiled else module
    optimiser = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        optimiser.zero_grad()
        F.cross_entropy(tensors_of(run(images))[0], labels).backward()
        optimiser.step()

    return step


def measure(name: str, z: float, run: Run) -> dict[str, Any]:
    """Times dense and pruned steps of one model, in turns."""
    clips = name in VIDEO_MODELS
    model = (video_model(name, pretrained=False).model if clips else timm.create_model(name)).train().to(run.device)
    images = torch.randn((run.batch, 16, 3, 224, 224) if clips else (run.batch, 3, 224, 224), device=run.device)
    labels = torch.randint(400, (run.batch,), device=run.device)
    gm = papr_fx.transform(model, timm.create_model(PROPOSAL), z, example_input=images[:1], verify=False)
    torch.compiler.reset()
    steps = {"pruned": step_of(gm, images, labels, compiled=run.compiled)}
    steps["dense"] = step_of(model, images, labels, compiled=run.compiled)
    if not clips:
        last: Any = timm.create_model(name).train().to(run.device)
        last.to(memory_format=torch.channels_last)
        packed = images.to(memory_format=torch.channels_last)
        steps["dense channels-last"] = step_of(last, packed, labels, compiled=run.compiled)
    times = median_times(steps, rounds=run.rounds, warmup=2, gradients=True)
    dense = min(times[key] for key in steps if key.startswith("dense"))
    found = papr_fx.report(gm)
    macs = 3 * found.dense_macs / (3 * found.pruned_macs + found.proposal_macs)
    speed = dense / times["pruned"]
    return {
        "model": name,
        "z": z,
        "run": "compiled" if run.compiled else "eager",
        "GMACs of a step, dense": 3 * found.dense_macs / 1e9,
        "pruned": (3 * found.pruned_macs + found.proposal_macs) / 1e9,
        "ms dense": dense,
        "ms pruned": times["pruned"],
        "speed-up": speed,
        "MAC ratio": macs,
        "of it": speed / macs,
    }


def main() -> None:
    """Prints the table and writes out/training.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--z", type=float, help="default: 0.5 for tokens, 0.65 for pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compiled steps, dense and pruned")
    parser.add_argument("--out", type=Path, default=Path("out/training.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(arguments.batch, arguments.rounds, device, arguments.compile)
    rows = [measure(name, arguments.z or MODELS.get(name, 0.5), run) for name in arguments.models]
    print(f"batch {arguments.batch}, proposal {PROPOSAL} included; {environment(0)}\n")
    print(
        tabulate(
            rows, headers="keys", floatfmt=("", "g", "", ".1f", ".1f", ".0f", ".0f", ".2f", ".2f", ".2f"), tablefmt="github"
        )
    )
    write(arguments.out, rows, seed=0)


if __name__ == "__main__":
    main()
