"""What `papr-fx eval`, `tune` and `reproduce` share: their options, the data, and a run on one process or on many.

Options are named as in timm's validate.py.
"""

from __future__ import annotations

import argparse
import io
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

from ..errors import ArgumentError
from ..evaluation.evaluate import DataError, Progress, Runner, evaluate
from ..evaluation.readers import Samples, open_reader
from ..evaluation.results import check_writable, part_of, read_part, write_part, write_rows, write_whole
from ..evaluation.subject import Subject, Variant
from ..planning.module import checked_z
from ..proposals.named import LITE0, VIDEO_MODELS
from ..proposals.saliency import NAMES

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def ratios(text: str) -> tuple[float, ...]:
    """Keep ratios such as 1.0,0.7,0.5, each once, for argparse."""
    try:
        return tuple(dict.fromkeys(checked_z(round(float(part), 6)) for part in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class _Flattened(argparse.Action):
    """Several values of `ratios` as one."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: object) -> None:
        setattr(namespace, self.dest, tuple(dict.fromkeys(z for some in values for z in some)))


def add_ratios(command: argparse.ArgumentParser, *, default: tuple[float, ...]) -> None:
    """Adds `--z`: keep ratios, with commas or spaces between."""
    shown = ",".join(f"{z:g}" for z in default)
    command.add_argument(
        "--z", type=ratios, nargs="+", action=_Flattened, default=default, help=f"keep ratios, with commas (default: {shown})"
    )


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 at least, not {number}")
    return number


def _count(text: str) -> int:
    """A whole number from 0 on, for argparse."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be 0 at least, not {number}")
    return number


def _share(text: str) -> float:
    """A number in (0, 1], for argparse."""
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must lie in (0, 1], not {text}")
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
    command.add_argument("--input-key", help="column of images of hfds/ data (default: image)")
    command.add_argument("--target-key", help="column of classes of hfds/ data (default: label)")
    command.add_argument("--batch-size", "-b", type=positive, help="samples a process (default: 64 images, 2 videos)")
    command.add_argument(
        "--workers",
        "-j",
        type=_count,
        default=min(4, os.cpu_count() or 1),
        help="processes that read samples (default: %(default)s)",
    )
    command.add_argument("--channels-last", action="store_true", help="memory layout of images and model")
    command.add_argument("--device", default="", help="default: cuda where there is one, else cpu")
    command.add_argument("--threads", type=positive, help="threads on a CPU (default: torch's)")
    command.add_argument("--pretrained", action="store_true", help="load pretrained weights (needs a network or timm's cache)")
    command.add_argument("--checkpoint", default="", help="a local checkpoint of the model, read by timm")
    command.add_argument("--proposal-checkpoint", default="", help="a local checkpoint of the proposal, read by timm")
    command.add_argument(
        "--seed", type=_count, default=0, help="of random weights, where none are loaded (default: %(default)s)"
    )
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
    command.add_argument("--crop-pct", type=_share, help="default: the model's")
    command.add_argument("--interpolation", choices=_INTERPOLATIONS, default="", help="default: the model's")
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
    for name, suffixes in (("results_file", (".csv", ".json")), ("plot", (".png",))):
        if path := vars(arguments).get(name):
            check_writable(path, suffixes)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        device = _joined(arguments.device)
        torch.manual_seed(arguments.seed)
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
        try:
            dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo")
        except (ValueError, RuntimeError) as error:
            raise ArgumentError(f"WORLD_SIZE is set, but processes cannot join (start them by torchrun): {error}") from error
        kind = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if kind == "cuda" else kind
    try:
        if kind.startswith("cuda:"):
            torch.cuda.set_device(kind)
        return torch.empty(0, device=kind).device
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"--device {kind}: {error}") from error


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
        keys={key: vars(arguments)[key] for key in ("input_key", "target_key") if vars(arguments)[key]},
    )
    classes = len(getattr(reader, "class_to_idx", ()))
    if classes and subject.classes and classes != subject.classes and is_first():
        print(
            f"note: the data has {classes} classes and the model {subject.classes}; --class-map FILE says which are which",
            file=sys.stderr,
        )
    return Samples(reader, subject.decode, subject.shape)


def views(arguments: argparse.Namespace) -> dict[str, int]:
    """The views of a video, as `clip_subject` takes them."""
    return {"temporal": arguments.temporal_views, "spatial": arguments.spatial_views, "step": arguments.frame_step}


def batch_size(arguments: argparse.Namespace, subject: Subject) -> int:
    """Samples in a batch of one process."""
    return arguments.batch_size or (2 if subject.views else 64)


def counted(arguments: argparse.Namespace, subject: Subject, variants: Sequence[Variant]) -> Progress:
    """What the forms of a model, the dense one first, find in the data, from where an interrupted run stopped."""
    data = samples(arguments, subject)
    settings = _settings(arguments, subject, len(data))
    progress = _from_first(lambda: read_part(arguments.results_file, settings)) if arguments.results_file else None
    if progress and is_first():
        print(f"{part_of(arguments.results_file)}: going on behind {progress.done} of {len(data)} samples")
    runners = {variant.name: _runner(variant.module, arguments, subject) for variant in variants}
    unit = "video" if subject.views else "img"
    with tqdm(total=len(data), initial=progress.done if progress else 0, unit=unit, disable=not is_first()) as bar:

        def note(found: Progress) -> None:
            if arguments.results_file and is_first():
                write_part(arguments.results_file, found, settings)

        found = evaluate(
            runners,
            data,
            dense=variants[0].name,
            batch_size=batch_size(arguments, subject),
            workers=arguments.workers,
            device=subject.example.device,
            channels_last=arguments.channels_last,
            progress=progress,
            behind_chunk=note,
            behind_batch=bar.update,
            real_labels=_real_labels(arguments, data),
            strict=arguments.strict,
        )
    if not found.total:
        if arguments.results_file and is_first():
            part_of(arguments.results_file).unlink(missing_ok=True)
        told = "; ".join(reason for _, reason in found.failed[:3])
        raise DataError(f"none of the {len(found.failed)} samples of {arguments.data} could be read: {told}")
    return found


def _from_first(read: Callable[[], Progress | None]) -> Progress | None:
    """What the first process reads, on every process: their file systems and moments may differ."""
    if not dist.is_initialized():
        return read()
    shared: list[Any] = [None]
    if is_first():
        try:
            shared = [read()]
        except ArgumentError as error:
            shared = [error]
    dist.broadcast_object_list(shared)
    if isinstance(shared[0], ArgumentError):
        raise shared[0]
    return shared[0]


def _runner(module: nn.Module, arguments: argparse.Namespace, subject: Subject) -> Runner:
    ready: Any = torch.compile(module) if arguments.torchcompile else module
    return Runner(ready, autocast=PRECISIONS[arguments.amp_dtype] if arguments.amp else None, views=subject.views)


def _settings(arguments: argparse.Namespace, subject: Subject, size: int) -> dict[str, Any]:
    """What results depend on; how many processes share the work, and in what batches, is no part of it."""
    apart = ("run", "results_file", "plot", "batch_size", "workers", "strict")
    given = {key: value for key, value in vars(arguments).items() if key not in apart}
    files = {name: _version(Path(value)) for name, value in given.items() if isinstance(value, str) and Path(value).is_file()}
    return {**given, **subject.config, "samples": size, "files": files}


def _version(file: Path) -> tuple[int, int]:
    """Tells a file from a later one of the same name: size and time of change."""
    return file.stat().st_size, file.stat().st_mtime_ns


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


def described(arguments: argparse.Namespace, subject: Subject, model: str, proposal: str) -> str:
    """The networks, and which have random weights."""
    words = [model + ("" if subject.loaded else " (random weights; --pretrained loads real ones)")]
    known = arguments.pretrained or arguments.proposal_checkpoint or proposal == LITE0
    words.append(f"proposal {proposal}" + ("" if known else " (random weights)"))
    return ", ".join(words)


def row_of(subject: Subject, variant: Variant, found: Progress) -> dict[str, Any]:
    """What was found for one form of a model: percents, GMACs, samples a second of one process, millions of parameters."""
    counts = found.counts[variant.name]
    row: dict[str, Any] = {"z": variant.z, "r": variant.r}
    if counts.labelled:
        row |= {word: round(100 * getattr(counts, word) / counts.labelled, 3) for word in ("top1", "top5")}
    if counts.real_total:
        row["top1_real"] = round(100 * counts.real / counts.real_total, 3)
    return row | {
        "agreement": round(100 * counts.agree / found.total, 3),
        "gmacs": variant.macs / 1e9,
        speed_key(subject): found.total / counts.seconds,
        "param_count": round(sum(p.numel() for p in variant.module.parameters()) / 1e6, 2),
        "count": found.total,
        "unreadable": len(found.failed),
    }


def speed_key(subject: Subject) -> str:
    """The column of speeds."""
    return "videos_per_sec" if subject.views else "img_per_sec"


def finish(arguments: argparse.Namespace, rows: Sequence[Mapping[str, Any]], failed: Sequence[tuple[int, str]]) -> None:
    """Names what could not be read, and writes the results."""
    tell_failed([reason for _, reason in failed])
    if arguments.results_file:
        settings = {key: value for key, value in vars(arguments).items() if key not in ("run", "results_file", "plot")}
        write_rows(arguments.results_file, rows, {**settings, "failed": failed})
        part_of(arguments.results_file).unlink(missing_ok=True)
    if arguments.plot:
        _plot(arguments.plot, rows)


def tell_failed(reasons: Sequence[str]) -> None:
    """Names what could not be read."""
    if reasons:
        print(f"{len(reasons)} could not be read and were left out:", *reasons, sep="\n  ", file=sys.stderr)


def _plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws accuracy, or agreement where there are no classes, against GMACs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    measured = "top1" if "top1" in rows[0] else "agreement"
    axes.plot([row["gmacs"] for row in rows], [row[measured] for row in rows], "o-")
    for row in rows:
        text = f"z={row['z']:g}" + (f" r={row['r']}" if row["r"] else "")
        axes.annotate(text, (row["gmacs"], row[measured]), xytext=(4, -10), textcoords="offset points", fontsize=8)
    label = {"top1": "top-1, %", "agreement": "agreement with the dense model, %"}[measured]
    axes.margins(x=0.15)  # for the last words
    axes.set(xlabel="GMACs, proposal included", ylabel=label, title=rows[0]["model"])
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_whole(path, picture.getvalue())
