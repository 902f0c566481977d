"""`papr-fx eval` and `papr-fx tune`: accuracy at several keep ratios in one pass, and the ratio for a target.

Options are named as in timm's validate.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from tabulate import tabulate
from timm.data import RealLabelsImagenet, create_dataset, create_transform, resolve_data_config
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from .choose import choose_keep_ratio
from .errors import ArgumentError
from .evaluate import Images, Progress, Runner, evaluate
from .macs import count_module_macs
from .module import PrunedModule, checked_z, shell
from .named import LITE0, image_model, proposal_for
from .report import report
from .results import part_of, read_part, write_part, write_rows
from .saliency import NAMES
from .transform import transform

_PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def ratios(text: str) -> tuple[float, ...]:
    """Keep ratios such as 1.0,0.7,0.5, for argparse."""
    try:
        return tuple(checked_z(float(part)) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _add_shared(command: argparse.ArgumentParser) -> None:
    """Adds the options that say what runs on which data."""
    command.add_argument("data", help="a folder with a folder a class, or with splits of such; or hfds/NAME as timm reads it")
    command.add_argument("--model", "-m", default="vit_base_patch16_224", help="name of a timm model (default: %(default)s)")
    command.add_argument(
        "--proposal", default="mobileone_s0", help=f"name of a timm ConvNet, or {LITE0} (default: %(default)s)"
    )
    command.add_argument("--proposal-size", type=int, help="shorter side of its images, in pixels (default: the model's)")
    command.add_argument("--proposal-checkpoint", default="", help="a local checkpoint of the proposal, read by timm")
    command.add_argument("--saliency", choices=NAMES, default="psm", help="source of the map (default: %(default)s)")
    command.add_argument(
        "--shared-stats", action="store_true", help="hand the model's normalised images to the proposal as they are"
    )
    command.add_argument("--split", default="validation", help="default: %(default)s")
    command.add_argument(
        "--class-map", default="", help="a file that lists the classes' folders in the order of the model's classes"
    )
    command.add_argument("--data-dir", help="cache folder of hfds/ data")
    command.add_argument("--batch-size", "-b", type=int, default=64, help="images a process (default: %(default)s)")
    command.add_argument("--workers", "-j", type=int, default=4, help="processes that read images (default: %(default)s)")
    command.add_argument("--img-size", type=int, help="side of the images, in pixels (default: the model's)")
    command.add_argument("--crop-pct", type=float, help="default: the model's")
    command.add_argument("--interpolation", default="", help="default: the model's")
    command.add_argument("--num-classes", type=int, help="default: the model's")
    command.add_argument("--channels-last", action="store_true", help="memory layout of images and model")
    command.add_argument("--device", default="", help="default: cuda where there is one, else cpu")
    command.add_argument("--threads", type=int, help="threads on a CPU (default: torch's)")
    command.add_argument("--pretrained", action="store_true", help="load pretrained weights (needs a network or timm's cache)")
    command.add_argument("--checkpoint", default="", help="a local checkpoint of the model, read by timm")
    command.add_argument("--seed", type=int, default=0, help="of random weights, where none are loaded (default: %(default)s)")


def add_eval(command: argparse.ArgumentParser) -> None:
    """Adds the options of `papr-fx eval`."""
    _add_shared(command)
    command.set_defaults(run=run_eval)
    command.add_argument("--z", type=ratios, default=(1.0, 0.7, 0.5), help="keep ratios, with commas (default: 1.0,0.7,0.5)")
    command.add_argument("--amp", action="store_true", help="run under autocast")
    command.add_argument("--amp-dtype", choices=_PRECISIONS, default="bfloat16", help="default: %(default)s")
    command.add_argument("--torchcompile", action="store_true", help="compile every variant")
    command.add_argument(
        "--real-labels", nargs="?", const="", metavar="JSON", help="also count ImageNet's reassessed labels (default: timm's)"
    )
    command.add_argument("--results-file", type=Path, help=".csv or .json file to write; an interrupted run goes on from it")
    command.add_argument("--plot", type=Path, help=".png file for accuracy against GMACs")
    command.add_argument("--strict", action="store_true", help="end where an image cannot be read")


def add_tune(command: argparse.ArgumentParser) -> None:
    """Adds the options of `papr-fx tune`."""
    _add_shared(command)
    command.set_defaults(run=run_tune)
    target = command.add_mutually_exclusive_group(required=True)
    target.add_argument("--max-drop", type=float, help="accuracy that may be lost, from 0 to 1")
    target.add_argument("--speedup", type=float, help="of a batch, eager, over the dense model")
    target.add_argument("--gmacs", type=float, help="of an image, the proposal included")
    command.add_argument("--samples", type=int, default=1000, help="images to try ratios on (default: %(default)s)")
    command.add_argument("--no-labels", action="store_true", help="count agreement with the dense model, not right answers")


def run_tune(arguments: argparse.Namespace) -> None:
    """Runs `papr-fx tune`."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = _joined(arguments.device)
    torch.manual_seed(arguments.seed)
    model = _model(arguments).to(device)
    config = _config(arguments, model)
    data = _data(arguments, config)
    proposal, options = _proposal(arguments, config)
    size = len(data)
    places = sorted({round(i * (size - 1) / max(1, arguments.samples - 1)) for i in range(min(size, arguments.samples))})
    images = DataLoader(Subset(data, places), arguments.batch_size, num_workers=arguments.workers)
    batches = [(sample[0][keep], sample[1][keep]) for sample in images if any(keep := [not error for error in sample[3]])]
    loader = [pixels for pixels, _ in batches] if arguments.no_labels else batches
    targets = {key: getattr(arguments, key) for key in ("max_drop", "speedup", "gmacs")}
    z = choose_keep_ratio(model, proposal, loader, **targets, example_input=batches[0][0][:1].to(device), **options)
    (name,) = (key for key, value in targets.items() if value is not None)
    print(tabulate(z.curve, headers=["z", name.replace("_", " ")], floatfmt=(".4f", ".3f"), tablefmt="github"))
    print(f"{_described(arguments)}\nz = {z:.4f}")


def run_eval(arguments: argparse.Namespace) -> None:
    """Runs `papr-fx eval`, on one process or as one of those that torchrun started."""
    if arguments.results_file and arguments.results_file.suffix not in (".csv", ".json"):
        raise ArgumentError(f"--results-file must end in .csv or .json, not {arguments.results_file}")
    if arguments.plot and arguments.plot.suffix != ".png":
        raise ArgumentError(f"--plot must end in .png, not {arguments.plot}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = _joined(arguments.device)
    try:
        _run(arguments, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _joined(name: str) -> torch.device:
    """This process's device; joins the others where torchrun started several."""
    kind = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise ArgumentError("--device cuda: no CUDA device is available")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo")
        if kind == "cuda":
            kind = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(kind)
    return torch.device(kind)


def _run(arguments: argparse.Namespace, device: torch.device) -> None:
    torch.manual_seed(arguments.seed)
    model = _model(arguments).to(device)
    config = _config(arguments, model)
    data = _data(arguments, config)
    variants = _variants(model, arguments, config)
    settings = _settings(arguments, config, len(data))
    progress = read_part(arguments.results_file, settings) if arguments.results_file else None
    if progress and is_first():
        print(f"{part_of(arguments.results_file)}: going on behind {progress.done} of {len(data)} samples")
    runners = {name: _runner(module, arguments) for name, (module, _) in variants.items()}
    with tqdm(total=len(data), initial=progress.done if progress else 0, unit="img", disable=not is_first()) as bar:

        def note(found: Progress) -> None:
            if arguments.results_file and is_first():
                write_part(arguments.results_file, found, settings)

        found = evaluate(
            runners,
            data,
            dense="1",
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            device=device,
            channels_last=arguments.channels_last,
            progress=progress,
            behind_chunk=note,
            behind_batch=bar.update,
            real_labels=_real_labels(arguments, data),
            strict=arguments.strict,
        )
    if is_first():
        _tell(arguments, config, variants, found, settings)


def is_first() -> bool:
    """Whether this is the one process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _model(arguments: argparse.Namespace) -> nn.Module:
    options = {"num_classes": arguments.num_classes} if arguments.num_classes else {}
    model = image_model(arguments.model, pretrained=arguments.pretrained, checkpoint=arguments.checkpoint, **options)
    if arguments.img_size and hasattr(model, "set_input_size"):
        cast(Any, model).set_input_size(arguments.img_size)
    if arguments.channels_last:
        cast(Any, model).to(memory_format=torch.channels_last)
    return model


def _data(arguments: argparse.Namespace, config: Mapping[str, Any]) -> Images:
    name, root = (arguments.data, arguments.data_dir) if arguments.data.startswith("hfds/") else ("", arguments.data)
    if root and not name and not Path(root).is_dir():
        raise ArgumentError(f"there is no folder {root}; it holds a folder a class, or {arguments.split}/ with such")
    try:
        dataset: Any = create_dataset(name, root=root, split=arguments.split, class_map=arguments.class_map)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        raise ArgumentError(f"cannot read images from {arguments.data}: {type(error).__name__}: {error}") from error
    options = {key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")}
    return Images(dataset, cast(Any, create_transform(**options, is_training=False)), config["input_size"])


def _described(arguments: argparse.Namespace) -> str:
    """The networks, and which have random weights."""
    loaded = arguments.pretrained
    words = [arguments.model + ("" if loaded or arguments.checkpoint else " (random weights; --pretrained loads real ones)")]
    known = loaded or arguments.proposal_checkpoint or arguments.proposal == LITE0
    words.append(f"proposal {arguments.proposal}" + ("" if known else " (random weights)"))
    return ", ".join(words)


def _config(arguments: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """How timm prepares images for a model."""
    given = {key: getattr(arguments, key) for key in ("img_size", "crop_pct", "interpolation")}
    return cast("dict[str, Any]", resolve_data_config(given, model=model))


def _proposal(arguments: argparse.Namespace, config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The proposal, and what `transform` is told of it."""
    proposal, statistics = proposal_for(
        (config["mean"], config["std"]),
        arguments.proposal,
        pretrained=arguments.pretrained,
        checkpoint=arguments.proposal_checkpoint,
    )
    return proposal, {
        "proposal_size": arguments.proposal_size,
        "input_stats": "shared" if arguments.shared_stats else statistics,
        "saliency": arguments.saliency,
    }


def _variants(model: nn.Module, arguments: argparse.Namespace, config: Mapping[str, Any]) -> dict[str, tuple[nn.Module, int]]:
    """The dense model and what is made of it at every keep ratio, each with its MACs, the proposal included."""
    like = next(model.parameters())
    example = torch.zeros((1, *config["input_size"]), dtype=like.dtype, device=like.device)
    found: dict[str, tuple[nn.Module, int]] = {"1": (model, count_module_macs(model, example))}
    some = [z for z in arguments.z if z < 1]
    if some:
        proposal, options = _proposal(arguments, config)
        gm = transform(model, proposal, some[0], example_input=example, **options)
        for z in some:
            pruned = PrunedModule(shell(gm), replace(gm.plan, z=z))
            found[f"{z:g}"] = pruned, report(pruned).total_macs
    return found


def _runner(module: nn.Module, arguments: argparse.Namespace) -> Runner:
    ready: Any = torch.compile(module) if arguments.torchcompile else module
    return Runner(ready, autocast=_PRECISIONS[arguments.amp_dtype] if arguments.amp else None)


def _settings(arguments: argparse.Namespace, config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """What results depend on; how many processes share the work, and in what batches, is no part of it."""
    apart = ("run", "results_file", "plot", "batch_size", "workers", "device", "threads", "torchcompile", "strict")
    given = {key: value for key, value in vars(arguments).items() if key not in apart}
    data = {key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct")}
    return {**given, **data, "samples": size}


def _real_labels(arguments: argparse.Namespace, data: Images) -> Callable[[int], Sequence[int]] | None:
    """ImageNet's reassessed labels of a sample by its place."""
    if arguments.real_labels is None:
        return None
    names = [Path(data.name(place)).name for place in range(len(data))]
    try:
        known: Any = RealLabelsImagenet([""] * 50_000, arguments.real_labels or None)
        labels = {name: known.real_labels[name] for name in names}
    except (OSError, ValueError, AssertionError, KeyError) as error:
        raise ArgumentError(f"--real-labels: they are for the 50000 files of ImageNet's validation: {error!r}") from error
    return lambda place: labels[names[place]]


def _tell(
    arguments: argparse.Namespace,
    config: Mapping[str, Any],
    variants: Mapping[str, tuple[nn.Module, int]],
    found: Progress,
    settings: Mapping[str, Any],
) -> None:
    rows: list[dict[str, Any]] = []
    for name, (module, macs) in variants.items():
        counts, total = found.counts[name], max(1, found.total)
        row = {
            "model": arguments.model,
            "z": float(name),
            "top1": round(100 * counts.top1 / total, 3),
            "top5": round(100 * counts.top5 / total, 3),
            "agreement": round(100 * counts.agree / total, 3),
            "gmacs": macs / 1e9,
            "img_per_sec": round(found.total / max(counts.seconds, 1e-9), 2),
            "param_count": round(sum(p.numel() for p in module.parameters()) / 1e6, 2),
            "img_size": config["input_size"][-1],
            "crop_pct": config["crop_pct"],
            "interpolation": config["interpolation"],
            "count": found.total,
            "unreadable": len(found.failed),
        }
        if counts.real_total:
            row["top1_real"] = round(100 * counts.real / counts.real_total, 3)
        rows.append(row)
    if 1.0 not in arguments.z:
        rows = rows[1:]
    shown = ["z", "top1", "top5", "top1_real", "agreement", "gmacs", "img_per_sec"]
    table = [{key: row[key] for key in shown if key in row} for row in rows]
    print(f"{_described(arguments)}: {found.total} images of {arguments.data}")
    print(tabulate(table, headers="keys", floatfmt=".2f", tablefmt="github"))
    if found.failed:
        print(f"{len(found.failed)} could not be read and were left out:", file=sys.stderr)
        for _, reason in found.failed:
            print(f"  {reason}", file=sys.stderr)
    if arguments.results_file:
        write_rows(arguments.results_file, rows, {**settings, "failed": found.failed})
        part_of(arguments.results_file).unlink(missing_ok=True)
    if arguments.plot:
        _plot(arguments.plot, arguments.model, rows)


def _plot(path: Path, model: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws accuracy against GMACs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["gmacs"] for row in rows], [row["top1"] for row in rows], "o-")
    for row in rows:
        axes.annotate(f"z={row['z']:g}", (row["gmacs"], row["top1"]), xytext=(4, -10), textcoords="offset points")
    axes.set(xlabel="GMACs, proposal included", ylabel="top-1, %", title=model)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
