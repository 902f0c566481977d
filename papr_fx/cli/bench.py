"""`papr-fx bench`: the dense model, its pruned forms and other token reducers, timed in turns.

Options are named as in timm's benchmark.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..evaluation import bench, bench_rows
from ..evaluation.bench import METHODS, Comparison, TimingSettings
from ..evaluation.bench_rows import Row
from ..evaluation.models import image_model
from ..planning import inputs
from ..proposals.named import LITE0
from .distributed import checked_device
from .networks import image_proposal
from .options import PRECISIONS, TIMM_SOURCES, add_ratios, nonnegative_int, positive_int

_WEIGHTS = {"float32": torch.float32, **PRECISIONS}


def add_bench(command: argparse.ArgumentParser) -> None:
    """Adds the options of `papr-fx bench`."""
    command.set_defaults(run=run_bench)
    command.add_argument(
        "--model", "-m", nargs="+", default=["vit_base_patch16_224"], help=f"names of timm models; {TIMM_SOURCES}"
    )
    command.add_argument(
        "--proposal", default="mobileone_s0", help=f"name of a timm ConvNet, or {LITE0} (default: %(default)s)"
    )
    command.add_argument(
        "--proposal-size", type=positive_int, help="shorter side of the proposal's images, in pixels (default: the model's)"
    )
    add_ratios(command, default=(0.5,))
    command.add_argument("--mode", choices=inputs.MODES, default="auto", help="what is pruned (default: %(default)s)")
    command.add_argument(
        "--reducers",
        type=_methods,
        default=("papr",),
        metavar="NAME,...",
        help=f"what to measure at the MACs of each keep ratio, any of {', '.join(_shown())} (default: papr; coarse is papr "
        "with background='coarse', at the same keep ratio); a name may end in :late or :share, as tome:late does: how tokens "
        "are spread over blocks, see --merge of eval",
    )
    command.add_argument("--batch-size", "-b", type=positive_int, nargs="+", default=[1, 8, 32], help="images per batch")
    command.add_argument("--img-size", type=positive_int, help="side of the images, in pixels (default: the model's)")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    command.add_argument("--precision", choices=_WEIGHTS, default="float32", help="of the weights (default: %(default)s)")
    command.add_argument("--amp", action="store_true", help="run under autocast")
    command.add_argument("--amp-dtype", choices=[*PRECISIONS], default="bfloat16", help="default: %(default)s")
    command.add_argument("--torchcompile", action="store_true", help="time compiled models too")
    command.add_argument("--num-warm-iter", type=nonnegative_int, default=2, help="untimed calls (default: %(default)s)")
    command.add_argument("--num-bench-iter", type=positive_int, default=10, help="timed calls (default: %(default)s)")
    command.add_argument("--threads", type=positive_int, help="CPU threads (default: torch's)")
    command.add_argument("--results-file", type=Path, help=".csv or .json file to write")
    command.add_argument("--pretrained", action="store_true", help="load pretrained weights; times do not depend on them")


def run_bench(arguments: argparse.Namespace) -> None:
    """Runs `papr-fx bench`."""
    checked_device(arguments.device)
    if arguments.results_file:
        bench_rows.check_suffix(arguments.results_file)
        bench_rows.write([], arguments.results_file)  # a file that cannot be written is refused before the work
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = [row for name in arguments.model for row in _rows(arguments, name)]
    device = torch.device(arguments.device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"{device}{threads}, {arguments.precision}{', autocast' if arguments.amp else ''}; proposal: {arguments.proposal}")
    print("GMACs are multiply-accumulates of one image, proposal included; speed-up is over the quicker dense form\n")
    print(bench_rows.table(rows))
    for key, batch in bench_rows.break_even(rows).items():
        print(f"{', '.join(key)}: " + (f"quicker than dense from batch {batch} on" if batch else "not quicker than dense"))
    if arguments.results_file:
        bench_rows.write(rows, arguments.results_file)


def _rows(arguments: argparse.Namespace, name: str) -> list[Row]:
    """Times one model, eager and with `--torchcompile` also compiled."""
    model, images = _model_and_images(arguments, name)
    proposal, statistics = image_proposal(arguments, model)
    options = {"input_stats": statistics, "proposal_size": arguments.proposal_size, "mode": arguments.mode}
    chosen = bench.candidates(model, proposal, images, Comparison(arguments.z, arguments.reducers, options))
    kinds = [False, True] if arguments.torchcompile else [False]
    calls = len(chosen) * len(kinds) * len(arguments.batch_size) * (arguments.num_warm_iter + arguments.num_bench_iter)
    with tqdm(total=calls, desc=name, unit="call", leave=False) as bar:
        return [
            row
            for compiled in kinds
            for row in bench.benchmark(name, chosen, images, _settings(arguments, compiled=compiled), progress=bar.update)
        ]


def _settings(arguments: argparse.Namespace, *, compiled: bool) -> TimingSettings:
    return TimingSettings(
        batch_sizes=arguments.batch_size,
        compiled=compiled,
        autocast=PRECISIONS[arguments.amp_dtype] if arguments.amp else None,
        rounds=arguments.num_bench_iter,
        warmup=arguments.num_warm_iter,
    )


def _model_and_images(arguments: argparse.Namespace, name: str) -> tuple[nn.Module, Tensor]:
    """A model, and images (1, C, H, W) of the size that it takes or that is asked for."""
    device, dtype = torch.device(arguments.device), _WEIGHTS[arguments.precision]
    model = image_model(name, pretrained=arguments.pretrained).to(device, dtype)
    images = inputs.example_images(model, None)
    if arguments.img_size and arguments.img_size not in images.shape[2:]:
        images = images.new_zeros((*images.shape[:2], arguments.img_size, arguments.img_size))
        if hasattr(model, "set_input_size"):
            cast(Any, model).set_input_size(arguments.img_size)
    return model, images


def _shown() -> list[str]:
    """The names of methods, without those that differ from another in their schedule only."""
    return [name for name in METHODS if ":" not in name]


def _methods(text: str) -> tuple[str, ...]:
    """Names of methods, separated by commas."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(_shown())}, also with :late or :share")
    return names
