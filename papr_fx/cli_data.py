"""What `papr-fx eval`, `tune` and `reproduce` share: their options, the data, and a run on one process or on many.

Options are named as in timm's validate.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.data import RealLabelsImagenet
from torch import nn
from tqdm import tqdm

from .data import Samples, open_reader
from .errors import ArgumentError
from .evaluate import Counts, Progress, Runner, evaluate
from .module import checked_z
from .named import LITE0, VIDEO_MODELS
from .results import part_of, read_part, write_part, write_rows
from .saliency import NAMES
from .subject import Subject, Variant

PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def ratios(text: str) -> tuple[float, ...]:
    """Keep ratios such as 1.0,0.7,0.5, for argparse."""
    try:
        return tuple(checked_z(float(part)) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 at least, not {number}")
    return number


def add_data(command: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Adds the options that say what data there are, and how they are run."""
    command.add_argument(
        "data",
        nargs="?" if optional else None,
        default="",
        help="a folder with a folder a class, or with splits of such; a .csv file of paths and classes; wds/FOLDER with "
        "WebDataset shards; or hfds/NAME",
    )
    command.add_argument("--split", default="validation", help="default: %(default)s; of shards also val-{00..07}.tar")
    command.add_argument(
        "--class-map", default="", help="a file that lists the classes' folders in the order of the model's classes"
    )
    command.add_argument("--data-dir", help="cache folder of hfds/ data; folder of the paths in a .csv file (default: its own)")
    command.add_argument("--batch-size", "-b", type=positive, default=64, help="samples a process (default: %(default)s)")
    command.add_argument("--workers", "-j", type=int, default=4, help="processes that read samples (default: %(default)s)")
    command.add_argument("--channels-last", action="store_true", help="memory layout of images and model")
    command.add_argument("--device", default="", help="default: cuda where there is one, else cpu")
    command.add_argument("--threads", type=positive, help="threads on a CPU (default: torch's)")
    command.add_argument("--pretrained", action="store_true", help="load pretrained weights (needs a network or timm's cache)")
    command.add_argument("--checkpoint", default="", help="a local checkpoint of the model, read by timm")
    command.add_argument("--proposal-checkpoint", default="", help="a local checkpoint of the proposal, read by timm")
    command.add_argument("--seed", type=int, default=0, help="of random weights, where none are loaded (default: %(default)s)")
    command.add_argument("--temporal-views", type=positive, default=5, help="clips of a video (default: %(default)s)")
    command.add_argument("--spatial-views", type=positive, default=3, help="crops of a clip (default: %(default)s)")
    command.add_argument("--frame-step", type=positive, default=4, help="every how manyth frame (default: %(default)s)")


def add_networks(command: argparse.ArgumentParser) -> None:
    """Adds the options that name a model and its proposal."""
    command.add_argument(
        "--model",
        "-m",
        default="vit_base_patch16_224",
        help=f"name of a timm model (default: %(default)s); for clips {' or '.join(VIDEO_MODELS)} with random weights, a "
        "folder that transformers' save_pretrained wrote, or a name on its hub with --pretrained",
    )
    command.add_argument(
        "--proposal",
        default="mobileone_s0",
        help=f"name of a ConvNet of timm, for clips also of torchvision or pytorchvideo, or {LITE0} (default: %(default)s)",
    )
    command.add_argument("--proposal-size", type=positive, help="shorter side of its images, in pixels (default: the model's)")
    command.add_argument("--saliency", choices=NAMES, default="psm", help="source of the map (default: %(default)s)")
    command.add_argument(
        "--shared-stats", action="store_true", help="hand the model's normalised images to the proposal as they are"
    )
    command.add_argument("--img-size", type=positive, help="side of the images, in pixels (default: the model's)")
    command.add_argument("--crop-pct", type=float, help="default: the model's")
    command.add_argument("--interpolation", default="", help="default: the model's")
    command.add_argument("--num-classes", type=positive, help="default: the model's")


def add_run(command: argparse.ArgumentParser) -> None:
    """Adds the options of a run that counts right answers."""
    command.add_argument("--amp", action="store_true", help="run under autocast")
    command.add_argument("--amp-dtype", choices=PRECISIONS, default="bfloat16", help="default: %(default)s")
    command.add_argument("--torchcompile", action="store_true", help="compile every variant")
    command.add_argument(
        "--real-labels", nargs="?", const="", metavar="JSON", help="also count ImageNet's reassessed labels (default: timm's)"
    )
    command.add_argument("--results-file", type=Path, help=".csv or .json file to write; an interrupted run goes on from it")
    command.add_argument("--plot", type=Path, help=".png file for accuracy against GMACs")
    command.add_argument("--strict", action="store_true", help="end where a sample cannot be read")


@contextmanager
def started(arguments: argparse.Namespace) -> Generator[torch.device]:
    """Checks the files to be written, sets threads and seed, and joins the others where torchrun started several processes."""
    results, plot = getattr(arguments, "results_file", None), getattr(arguments, "plot", None)
    if results and results.suffix not in (".csv", ".json"):
        raise ArgumentError(f"--results-file must end in .csv or .json, not {results}")
    if plot and plot.suffix != ".png":
        raise ArgumentError(f"--plot must end in .png, not {plot}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = _joined(arguments.device)
    torch.manual_seed(arguments.seed)
    try:
        yield device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _joined(name: str) -> torch.device:
    """This process's device."""
    kind = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise ArgumentError("--device cuda: no CUDA device is available")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo")
        if kind == "cuda":
            kind = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(kind)
    return torch.device(kind)


def is_first() -> bool:
    """Whether this is the one process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def samples(arguments: argparse.Namespace, subject: Subject) -> Samples:
    """The data as the model takes them."""
    reader = open_reader(
        arguments.data,
        split=arguments.split,
        class_map=arguments.class_map,
        data_dir=arguments.data_dir,
        suffixes=subject.suffixes,
    )
    return Samples(reader, subject.decode, subject.shape)


def counted(arguments: argparse.Namespace, subject: Subject, variants: Sequence[Variant]) -> Progress:
    """What the forms of a model, the dense one first, find in the data, from where an interrupted run stopped."""
    if arguments.channels_last and subject.views:
        raise ArgumentError("--channels-last is a layout of images; clips have none")
    data = samples(arguments, subject)
    settings = _settings(arguments, subject, len(data))
    progress = read_part(arguments.results_file, settings) if arguments.results_file else None
    if progress and is_first():
        print(f"{part_of(arguments.results_file)}: going on behind {progress.done} of {len(data)} samples")
    runners = {variant.name: _runner(variant.module, arguments, subject) for variant in variants}
    unit = "video" if subject.views else "img"
    with tqdm(total=len(data), initial=progress.done if progress else 0, unit=unit, disable=not is_first()) as bar:

        def note(found: Progress) -> None:
            if arguments.results_file and is_first():
                write_part(arguments.results_file, found, settings)

        return evaluate(
            runners,
            data,
            dense=variants[0].name,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            device=subject.example.device,
            channels_last=arguments.channels_last,
            progress=progress,
            behind_chunk=note,
            behind_batch=bar.update,
            real_labels=_real_labels(arguments, data),
            strict=arguments.strict,
        )


def _runner(module: nn.Module, arguments: argparse.Namespace, subject: Subject) -> Runner:
    ready: Any = torch.compile(module) if arguments.torchcompile else module
    return Runner(ready, autocast=PRECISIONS[arguments.amp_dtype] if arguments.amp else None, views=subject.views)


def _settings(arguments: argparse.Namespace, subject: Subject, size: int) -> dict[str, Any]:
    """What results depend on; how many processes share the work, and in what batches, is no part of it."""
    apart = ("run", "results_file", "plot", "batch_size", "workers", "device", "threads", "torchcompile", "strict")
    given = {key: value for key, value in vars(arguments).items() if key not in apart}
    return {**given, **subject.config, "samples": size}


def _real_labels(arguments: argparse.Namespace, data: Samples) -> Callable[[int], Sequence[int]] | None:
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


def described(arguments: argparse.Namespace, model: str, proposal: str) -> str:
    """The networks, and which have random weights."""
    loaded = arguments.pretrained
    words = [model + ("" if loaded or arguments.checkpoint else " (random weights; --pretrained loads real ones)")]
    known = loaded or arguments.proposal_checkpoint or proposal == LITE0
    words.append(f"proposal {proposal}" + ("" if known else " (random weights)"))
    return ", ".join(words)


def row_of(subject: Subject, variant: Variant, found: Progress) -> dict[str, Any]:
    """What was found for one form of a model: percents, GMACs, samples a second, millions of parameters."""
    counts, total = found.counts.get(variant.name, Counts()), max(1, found.total)
    row: dict[str, Any] = {
        "z": variant.z,
        "r": variant.r,
        "top1": round(100 * counts.top1 / total, 3),
        "top5": round(100 * counts.top5 / total, 3),
        "agreement": round(100 * counts.agree / total, 3),
        "gmacs": variant.macs / 1e9,
        f"{'videos' if subject.views else 'img'}_per_sec": round(found.total / max(counts.seconds, 1e-9), 2),
        "param_count": round(sum(p.numel() for p in variant.module.parameters()) / 1e6, 2),
        "count": found.total,
        "unreadable": len(found.failed),
    }
    if counts.real_total:
        row["top1_real"] = round(100 * counts.real / counts.real_total, 3)
    return row


def finish(arguments: argparse.Namespace, rows: Sequence[Mapping[str, Any]], failed: Sequence[tuple[int, str]]) -> None:
    """Names what could not be read, and writes the results."""
    if failed:
        print(f"{len(failed)} could not be read and were left out:", file=sys.stderr)
        for _, reason in failed:
            print(f"  {reason}", file=sys.stderr)
    if arguments.results_file:
        settings = {key: value for key, value in vars(arguments).items() if key not in ("run", "results_file", "plot")}
        write_rows(arguments.results_file, rows, {**settings, "failed": failed})
        part_of(arguments.results_file).unlink(missing_ok=True)
    if arguments.plot:
        _plot(arguments.plot, rows)


def _plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws accuracy against GMACs, a line a model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for model in dict.fromkeys(row["model"] for row in rows):
        some = [row for row in rows if row["model"] == model]
        axes.plot([row["gmacs"] for row in some], [row["top1"] for row in some], "o-", label=model)
        for row in some:
            text = f"z={row['z']:g}" + (f" r={row['r']}" if row["r"] else "")
            axes.annotate(text, (row["gmacs"], row["top1"]), xytext=(4, -10), textcoords="offset points", fontsize=8)
    axes.set(xlabel="GMACs, proposal included", ylabel="top-1, %")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
