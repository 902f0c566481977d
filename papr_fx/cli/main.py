"""The command line: `papr-fx COMMAND`, the same as `python -m papr_fx COMMAND`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from tabulate import tabulate
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import ArgumentError, PaprError
from ..evaluation import bench, coverage
from ..evaluation.models import VIDEO_MODELS, image_model, proposal_for
from ..evaluation.timing import median_times
from ..planning import inputs
from ..planning.module import PrunedModule, checked_z, keep_masks, set_keep_ratio, significance
from ..proposals.named import LITE0
from ..proposals.statistics import InputStats
from ..review.diff import graph_diff
from ..review.report import report
from ..transform import transform
from .data import add_ratios, positive
from .eval import add_eval, add_tune
from .reproduce import add_reproduce

if TYPE_CHECKING:
    from PIL.Image import Image

_DEFAULT_MODEL = "vit_small_patch16_224"
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code, 2 for refused input, 130 where it is interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        _check_out(getattr(arguments, "out", None))
        arguments.run(arguments)
    except PaprError as error:
        print(f"papr-fx: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("papr-fx: interrupted", file=sys.stderr)
        return 130
    return 0


def _check_out(out: Path | None) -> None:
    """Refuses a picture that could not be written, before the work is done."""
    if out is None:
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(out.parent, os.W_OK)
    except OSError:
        writable = False
    if out.suffix != ".png" or out.is_dir() or not writable:
        raise ArgumentError(f"--out must be a .png file that can be written, not {out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="papr-fx", description="Prunes the patches that matter least to a vision model.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="prune a ViT on a photograph, offline: table, picture and graph diff")
    demo.add_argument("--clip", action="store_true", help="prune a video transformer on a clip instead")
    demo.set_defaults(run=_demo)
    show = commands.add_parser(
        "show", help="draw the map and the kept patches of an image, for each stage of a hierarchical model, or of a clip"
    )
    show.add_argument("file", type=Path, help="an image or a video")
    show.set_defaults(run=_show)
    diff = commands.add_parser("diff", help="print what changes in a model's graph")
    diff.add_argument("model", help="name of a timm model")
    diff.set_defaults(run=_diff)
    for command in (demo, show, diff):
        many = command is not diff
        if many:
            command.add_argument(
                "--model",
                default="",
                help=f"name of a timm model (default: {_DEFAULT_MODEL}); for clips {' or '.join(VIDEO_MODELS)} with random "
                "weights, a folder that transformers' save_pretrained wrote, or a name on its hub with --pretrained",
            )
            command.add_argument(
                "--out", type=Path, default=Path("out/papr.png"), help="picture to write (default: %(default)s)"
            )
        command.add_argument(
            "--proposal",
            default=LITE0,
            help=f"name of a ConvNet of timm, for clips also of torchvision or pytorchvideo, or {LITE0}: EfficientNet-Lite0 "
            "with ImageNet weights from its package (default)",
        )
        if many:
            add_ratios(command, default=(0.7, 0.5, 0.3))
        else:
            command.add_argument("--z", type=float, default=0.5, help="keep ratio (default: %(default)s)")
        command.add_argument(
            "--pretrained", action="store_true", help="load pretrained weights (needs a network or timm's cache)"
        )
        command.add_argument("--checkpoint", default="", help="a local checkpoint of the model, read by timm")
    _add_bench(commands.add_parser("bench", help="time the dense model, its pruned forms and their peers in turns"))
    add_eval(commands.add_parser("eval", help="accuracy dense and at several keep ratios, in one pass over a data set"))
    add_tune(commands.add_parser("tune", help="find the keep ratio for an accuracy, a speed-up or a number of MACs"))
    add_reproduce(commands.add_parser("reproduce", help="measure a table of the paper, side by side with its figures"))
    _add_models(commands.add_parser("models", help="try every architecture of a library: what is pruned, and what is refused"))
    return parser


def _reducers(text: str) -> tuple[str, ...]:
    """Names of reducers, for argparse."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in bench.VARIANTS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(bench.VARIANTS)}")
    return names


def _add_bench(command: argparse.ArgumentParser) -> None:
    """Options are named as in timm's benchmark.py."""
    command.set_defaults(run=_bench)
    command.add_argument("--model", "-m", nargs="+", default=["vit_base_patch16_224"], help="names of timm models")
    command.add_argument(
        "--proposal", default="mobileone_s0", help=f"name of a timm ConvNet, or {LITE0} (default: %(default)s)"
    )
    command.add_argument("--proposal-size", type=int, help="shorter side of its images, in pixels (default: the model's)")
    add_ratios(command, default=(0.5,))
    command.add_argument("--mode", choices=inputs.MODES, default="auto", help="what is pruned (default: %(default)s)")
    command.add_argument(
        "--reducers",
        type=_reducers,
        default=("papr",),
        metavar="NAME,...",
        help=f"what to measure at the MACs of each keep ratio, among {', '.join(bench.VARIANTS)} (default: papr)",
    )
    command.add_argument("--batch-size", "-b", type=positive, nargs="+", default=[1, 8, 32], help="images in a batch")
    command.add_argument("--img-size", type=int, help="side of the images, in pixels (default: the model's)")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    command.add_argument("--precision", choices=_PRECISIONS, default="float32", help="of weights (default: %(default)s)")
    command.add_argument("--amp", action="store_true", help="run under autocast")
    command.add_argument("--amp-dtype", choices=[*_PRECISIONS][1:], default="bfloat16", help="default: %(default)s")
    command.add_argument("--torchcompile", action="store_true", help="compiled too, beside eager")
    command.add_argument("--num-warm-iter", type=int, default=2, help="untimed calls (default: %(default)s)")
    command.add_argument("--num-bench-iter", type=positive, default=10, help="timed calls (default: %(default)s)")
    command.add_argument("--threads", type=int, help="threads on a CPU (default: torch's)")
    command.add_argument("--results-file", type=Path, help=".csv or .json file to write")
    command.add_argument("--pretrained", action="store_true", help="load pretrained weights; times do not depend on them")


def _add_models(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_models)
    command.add_argument("--library", choices=coverage.LIBRARIES, nargs="+", default=["timm"])
    command.add_argument(
        "--filter",
        nargs="+",
        default=[],
        metavar="GLOB",
        help="architectures or families, which are modules of the library (default: transformers and what took their shape)",
    )
    command.add_argument("--z", type=float, default=0.5, help="keep ratio")
    command.add_argument("--workers", type=positive, default=1, help="processes, of one thread each (default: %(default)s)")
    command.add_argument("--table", type=Path, help="also write the tables to this Markdown file")


@dataclass(frozen=True)
class _Prepared:
    """A model, its pruned form at the first keep ratio asked for, and one preprocessed image (1, 3, H, W)."""

    model: nn.Module
    gm: PrunedModule
    images: Tensor
    photograph: Tensor


def _demo(arguments: argparse.Namespace) -> None:
    from PIL.Image import fromarray
    from skimage.data import coffee

    if arguments.clip:
        _clip(arguments, None)
        return
    arguments.model = arguments.model or _DEFAULT_MODEL
    prepared = _prepared(arguments, fromarray(coffee()))
    model, gm, images = prepared.model, prepared.gm, prepared.images
    weights = (
        "pretrained weights"
        if arguments.pretrained or arguments.checkpoint
        else "random weights (--pretrained loads real ones)"
    )
    print(f"photograph: an espresso, from scikit-image\nmodel: {arguments.model}, {weights}\nproposal: {arguments.proposal}\n")
    batch = images.repeat(8, 1, 1, 1)
    print(
        f"8 images, {torch.get_num_threads()} threads, eager, proposal included; each pruned run takes turns with a dense one"
    )
    rows: list[tuple[Any, ...]] = []
    for z in arguments.z:
        set_keep_ratio(gm, z)
        found, site = report(gm), report(gm).sites[0]
        times = median_times({"dense": lambda: model(batch), "pruned": lambda: gm(batch)}, rounds=5)
        rows.append(
            (
                z,
                f"{site.dense} -> {site.kept}",
                found.dense_macs / 1e9,
                found.total_macs / 1e9,
                times["dense"],
                times["pruned"],
                times["dense"] / times["pruned"],
            )
        )
    headers = ["z", "positions", "GMACs dense", "GMACs with proposal", "ms dense", "ms pruned", "speed-up"]
    print(tabulate(rows, headers=headers, floatfmt=("g", "", ".2f", ".2f", ".0f", ".0f", ".2f"), tablefmt="github"))
    _draw(arguments, prepared)
    print(f"\nwhat changed in the graph at z={arguments.z[-1]:g}:\n{graph_diff(model, gm)}")


def _show(arguments: argparse.Namespace) -> None:
    from PIL import UnidentifiedImageError
    from PIL.Image import DecompressionBombError
    from PIL.Image import open as open_image

    try:
        with open_image(arguments.file) as opened:
            animated = opened.format in ("GIF", "WEBP", "PNG") and getattr(opened, "is_animated", False)
            image = opened.convert("RGB")
    except UnidentifiedImageError:
        _clip(arguments, arguments.file)
        return
    except (OSError, DecompressionBombError) as error:
        raise ArgumentError(f"cannot read an image from {arguments.file}: {error}") from error
    if animated:
        _clip(arguments, arguments.file)
        return
    arguments.model = arguments.model or _DEFAULT_MODEL
    print(f"model: {arguments.model}\nproposal: {arguments.proposal}")
    _draw(arguments, _prepared(arguments, image))


def _clip(arguments: argparse.Namespace, path: Path | None) -> None:
    """Shows a clip, or that of the demo."""
    from ..video import read_video
    from .clips import demo_clip, show_clip

    if arguments.checkpoint:
        raise ArgumentError("--checkpoint is read by timm: for clips give --model the folder of a video model")
    arguments.model = arguments.model or next(iter(VIDEO_MODELS))
    if path is None:
        demo_clip(arguments)
    else:
        show_clip(arguments, read_video(path))


def _diff(arguments: argparse.Namespace) -> None:
    model = _model(arguments)
    proposal, statistics = _proposal(arguments, model)
    print(graph_diff(model, transform(model, proposal, arguments.z, input_stats=statistics)), end="")


def _bench(arguments: argparse.Namespace) -> None:
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise ArgumentError("--device cuda: no CUDA device is available")
    if arguments.results_file:
        bench.check_suffix(arguments.results_file)
        bench.write([], arguments.results_file)  # a file that cannot be written shows before the work is done
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dtype, device = _PRECISIONS[arguments.precision], torch.device(arguments.device)
    kinds = [False, True] if arguments.torchcompile else [False]
    rows: list[bench.Row] = []
    for name in arguments.model:
        model = image_model(name, pretrained=arguments.pretrained).to(device, dtype)
        images = inputs.example_images(model, None)
        if arguments.img_size and arguments.img_size not in images.shape[2:]:
            images = images.new_zeros((*images.shape[:2], arguments.img_size, arguments.img_size))
            if hasattr(model, "set_input_size"):
                cast(Any, model).set_input_size(arguments.img_size)
        proposal, statistics = _proposal(arguments, model)
        chosen = bench.variants(
            model,
            proposal,
            arguments.z,
            images=images,
            reducers=arguments.reducers,
            input_stats=statistics,
            proposal_size=arguments.proposal_size,
            mode=arguments.mode,
        )
        calls = len(chosen) * len(kinds) * len(arguments.batch_size) * (arguments.num_warm_iter + arguments.num_bench_iter)
        with tqdm(total=calls, desc=name, unit="call", leave=False) as bar:
            for compiled in kinds:
                rows += bench.benchmark(
                    name,
                    chosen,
                    images,
                    batch_sizes=arguments.batch_size,
                    compiled=compiled,
                    autocast=_PRECISIONS[arguments.amp_dtype] if arguments.amp else None,
                    rounds=arguments.num_bench_iter,
                    warmup=arguments.num_warm_iter,
                    progress=bar.update,
                )
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"{device}{threads}, {arguments.precision}{', autocast' if arguments.amp else ''}; proposal: {arguments.proposal}")
    print("GMACs are multiply-accumulates of one image, proposal included; speed-up is over the quicker dense form\n")
    print(bench.table(rows))
    for key, batch in bench.break_even(rows).items():
        print(f"{', '.join(key)}: " + (f"quicker than dense from batch {batch} on" if batch else "not quicker than dense"))
    if arguments.results_file:
        bench.write(rows, arguments.results_file)


def _models(arguments: argparse.Namespace) -> None:
    chosen = [a for library in arguments.library for a in coverage.architectures(library, arguments.filter)]

    def progress(line: str) -> None:
        print(line, file=sys.stderr)

    rows = coverage.survey(chosen, checked_z(arguments.z), workers=arguments.workers, progress=progress)
    print(coverage.tables(rows))
    if arguments.table:
        arguments.table.parent.mkdir(parents=True, exist_ok=True)
        arguments.table.write_text(coverage.document(rows, arguments.z))


def _prepared(arguments: argparse.Namespace, image: Image) -> _Prepared:
    model = _model(arguments)
    proposal, statistics = _proposal(arguments, model)
    config = resolve_model_data_config(model)
    images = cast(Any, create_transform(**config, is_training=False))(image).unsqueeze(0)  # (1, 3, H, W)
    gm = transform(model, proposal, arguments.z[0], example_input=images, input_stats=statistics)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return _Prepared(model, gm, images, images[0] * std + mean)


def _draw(arguments: argparse.Namespace, prepared: _Prepared) -> None:
    from .draw import draw

    rows: list[dict[str, Tensor]] = []
    for z in arguments.z:
        set_keep_ratio(prepared.gm, z)
        masks = keep_masks(prepared.gm, prepared.images).items()
        rows.append({f"z={z:g}: {int(mask.sum())} of {grid[0]} x {grid[1]}": mask[0] for grid, mask in masks})
    one_grid = all(len(row) == 1 for row in rows)
    kept = [{title: mask for row in rows for title, mask in row.items()}] if one_grid else rows  # else a row a keep ratio
    draw(arguments.out, prepared.photograph, significance(prepared.gm, prepared.images)[0], kept)
    print(f"picture: {arguments.out}")


def _model(arguments: argparse.Namespace) -> nn.Module:
    return image_model(arguments.model, pretrained=arguments.pretrained, checkpoint=arguments.checkpoint)


def _proposal(arguments: argparse.Namespace, model: nn.Module) -> tuple[nn.Module, InputStats]:
    config = resolve_model_data_config(model)
    return proposal_for((config["mean"], config["std"]), arguments.proposal, pretrained=arguments.pretrained)


if __name__ == "__main__":
    sys.exit(main())
