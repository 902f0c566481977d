"""Argparse types, and the options that several commands share. Options are named as in timm's validate.py."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, cast

import torch
from timm.utils import ParseKwargs

from ..errors import ArgumentError
from ..evaluation.classes import ORDERS
from ..evaluation.models import VIDEO_MODELS
from ..passes.merge_tokens import Merge
from ..passes.schedules import Schedule
from ..planning.inputs import BACKGROUNDS
from ..planning.module import checked_z
from ..proposals.named import LITE0
from ..proposals.saliency import CLIP_NAMES, NAMES

DEFAULT_MODEL = "vit_small_patch16_224"
TIMM_SOURCES = "hf-hub:OWNER/NAME and local-dir:FOLDER name one that timm saved"
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_CLIP_MODELS = (
    f"for clips {' or '.join(VIDEO_MODELS)} with random weights, a folder written by transformers' save_pretrained, or with "
    "--pretrained a name on its hub"
)


def ratios(text: str) -> tuple[float, ...]:
    """Keep ratios such as 1.0,0.7,0.5, without duplicates."""
    try:
        return tuple(dict.fromkeys(checked_z(round(float(part), 6)) for part in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    number = _whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def nonnegative_int(text: str) -> int:
    """A whole number of at least 0."""
    number = _whole(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {number}")
    return number


def merging(text: str) -> str:
    """Tokens to merge per block, as `merge_of` reads them: 8, 8:late, 8:share or 4,4,8,8."""
    try:
        removes = merge_of(text).removes
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not removes:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return text


def merge_of(text: str) -> Merge:
    """The reduction of `--merge`. Text, not this, is what goes into files of results.

    Raises:
        ArgumentError: A number is out of range, or the schedule is unknown.
    """
    counts, colon, schedule = text.partition(":")
    numbers = [_whole(part) for part in counts.split(",")]
    spread = cast(Schedule, schedule if colon else "constant")
    return Merge(numbers[0] if len(numbers) == 1 else numbers, schedule=spread)


def fraction(text: str) -> float:
    """A number in (0, 1]."""
    try:
        number = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from error
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must lie in (0, 1], not {text}")
    return number


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from error


class _Options(ParseKwargs):
    """As timm reads them, and names what is none."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: object) -> None:
        try:
            super().__call__(parser, namespace, values)
        except ValueError as error:
            raise argparse.ArgumentError(self, f"must be NAME=VALUE, such as depth=6, not {' '.join(values)}") from error


class _Flattened(argparse.Action):
    """Joins several values of `ratios` to one, without duplicates."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: object) -> None:
        setattr(namespace, self.dest, tuple(dict.fromkeys(z for value in values for z in value)))


def add_ratios(command: argparse.ArgumentParser, *, default: tuple[float, ...]) -> None:
    """Adds `--z`: keep ratios, separated by commas or spaces."""
    shown = ",".join(f"{z:g}" for z in default)
    command.add_argument(
        "--z",
        type=ratios,
        nargs="+",
        action=_Flattened,
        default=default,
        help=f"keep ratios, separated by commas (default: {shown})",
    )


def add_picture(command: argparse.ArgumentParser) -> None:
    """Adds the options of a command that draws a picture: a model, several keep ratios, a file."""
    command.add_argument(
        "--model", default="", help=f"name of a timm model (default: {DEFAULT_MODEL}); {TIMM_SOURCES}; {_CLIP_MODELS}"
    )
    command.add_argument("--out", type=Path, default=Path("out/papr.png"), help="picture to write (default: %(default)s)")
    add_lite0(command)
    add_ratios(command, default=(0.7, 0.5, 0.3))
    add_background(command)
    add_weights(command)


def check_picture(out: Path) -> None:
    """Refuses a picture that cannot be written, before the work is done; makes its folder."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(out.parent, os.W_OK)
    except OSError:
        writable = False
    if out.suffix != ".png" or out.is_dir() or not writable:
        raise ArgumentError(f"--out must be a .png file that can be written, not {out}")


def add_lite0(command: argparse.ArgumentParser) -> None:
    """Adds `--proposal`, by default EfficientNet-Lite0."""
    command.add_argument(
        "--proposal",
        default=LITE0,
        help=f"name of a timm ConvNet ({TIMM_SOURCES}), for clips also of torchvision or pytorchvideo, or {LITE0}: "
        "EfficientNet-Lite0 with ImageNet weights from its package (default)",
    )


def add_background(command: argparse.ArgumentParser) -> None:
    """Adds `--background`."""
    command.add_argument(
        "--background",
        choices=BACKGROUNDS,
        default="auto",
        help="what becomes of dropped positions: of tokens drop, or coarse, one token for each cell of 2 x 2 dropped patches "
        "(beyond the paper); of pixel operators keep or zero (default: %(default)s)",
    )


def add_weights(command: argparse.ArgumentParser) -> None:
    """Adds the options that say where weights come from."""
    command.add_argument("--pretrained", action="store_true", help="load pretrained weights (needs a network or timm's cache)")
    command.add_argument("--checkpoint", default="", help="local checkpoint of the model, read by timm")


def add_data(command: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Adds the options that name the data, and say how models run on it."""
    command.add_argument(
        "data",
        nargs="?" if optional else None,
        default="",
        help="a folder with one folder per class, or with splits of such folders; a .csv file of paths and classes; wds/FOLDER "
        "with WebDataset shards; or hfds/NAME",
    )
    command.add_argument("--split", default="validation", help="default: %(default)s; also names of shards: val-{00..07}.tar")
    command.add_argument("--class-map", default="", help="file that lists the class folders in the model's order")
    command.add_argument(
        "--class-order",
        choices=ORDERS,
        default=ORDERS[0],
        help="how classes are numbered: natural, the innermost folders as timm does (2 before 10), or torchvision, the "
        "outermost folders by character (10 before 2) (default: %(default)s)",
    )
    command.add_argument("--data-dir", help="cache folder of hfds/ data; folder of the paths in a .csv file (default: its own)")
    command.add_argument("--input-key", help="column of the images in hfds/ data (default: image)")
    command.add_argument("--target-key", help="column of the classes in hfds/ data (default: label)")
    command.add_argument("--batch-size", "-b", type=positive_int, help="samples per process (default: 64 images or 2 videos)")
    command.add_argument(
        "--workers",
        "-j",
        type=nonnegative_int,
        default=min(4, _cores()),
        help="processes that read samples (default: %(default)s)",
    )
    command.add_argument("--channels-last", action="store_true", help="use the channels-last memory layout")
    command.add_argument("--device", default="", help="default: cuda if available, else cpu")
    command.add_argument("--threads", type=positive_int, help="CPU threads (default: torch's)")
    add_weights(command)
    command.add_argument("--proposal-checkpoint", default="", help="local checkpoint of the proposal, read by timm")
    command.add_argument("--seed", type=nonnegative_int, default=0, help="seed of random weights (default: %(default)s)")
    command.add_argument("--temporal-views", type=positive_int, default=5, help="clips per video (default: %(default)s)")
    command.add_argument("--spatial-views", type=positive_int, default=3, help="crops per clip (default: %(default)s)")
    command.add_argument("--frame-step", type=positive_int, default=4, help="use every n-th frame (default: %(default)s)")


def add_networks(command: argparse.ArgumentParser) -> None:
    """Adds the options that name a model and its proposal."""
    command.add_argument(
        "--model",
        "-m",
        default="vit_base_patch16_224",
        help=f"name of a timm model (default: %(default)s); {TIMM_SOURCES}; {_CLIP_MODELS}",
    )
    command.add_argument(
        "--proposal",
        default="mobileone_s0",
        help=f"name of a timm ConvNet ({TIMM_SOURCES}), for clips also of torchvision or pytorchvideo, or {LITE0} "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--proposal-size", type=positive_int, help="shorter side of the proposal's images, in pixels (default: the model's)"
    )
    command.add_argument(
        "--saliency",
        choices=(*NAMES, *CLIP_NAMES),
        default="psm",
        metavar="NAME",
        help=f"kind of saliency map: {', '.join(NAMES)}; for clips also motion, which needs no proposal, or motion* and one of "
        "these (default: %(default)s)",
    )
    command.add_argument(
        "--shared-stats", action="store_true", help="give the model's normalised images to the proposal unchanged"
    )
    add_background(command)
    command.add_argument("--img-size", type=positive_int, help="side of the images, in pixels (default: the model's)")
    command.add_argument("--crop-pct", type=fraction, help="centre crop, as a fraction of the image (default: the model's)")
    command.add_argument("--interpolation", choices=_INTERPOLATIONS, default="", help="default: the model's")
    command.add_argument("--num-classes", type=positive_int, help="default: the model's")
    command.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=_Options,
        metavar="NAME=VALUE",
        help="further options of timm.create_model, such as depth=6 global_pool=avg",
    )


def add_run(command: argparse.ArgumentParser) -> None:
    """Adds the options of a run that measures accuracy."""
    command.add_argument("--amp", action="store_true", help="run under autocast")
    command.add_argument("--amp-dtype", choices=PRECISIONS, default="bfloat16", help="default: %(default)s")
    command.add_argument("--torchcompile", action="store_true", help="compile every variant")
    command.add_argument(
        "--real-labels", nargs="?", const="", metavar="JSON", help="also count ImageNet's reassessed labels (default: timm's)"
    )
    command.add_argument(
        "--results-file", type=Path, help=".csv or .json file to write; an interrupted run continues where it stopped"
    )
    command.add_argument("--plot", type=Path, help=".png file to write: accuracy against GMACs")
    command.add_argument("--strict", action="store_true", help="stop at the first sample that cannot be read")


def add_random(command: argparse.ArgumentParser) -> None:
    """Adds `--no-random`."""
    command.add_argument(
        "--no-random",
        dest="random",
        action="store_false",
        help="do not measure a random map beside the chosen one; that tells whether the map helps on these data (tune: with "
        "--max-drop) and costs one more run of the pruned model for each image and keep ratio",
    )


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
