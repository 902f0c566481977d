"""`papr-fx show`: what a model keeps of an image or a clip, as a picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import timm

from ..errors import ArgumentError
from ..evaluation.image_file import IMAGE_SUFFIXES, is_animation, read_image
from ..evaluation.models import VIDEO_MODELS
from .images import draw_image, prune_image
from .options import DEFAULT_MODEL, add_picture, check_picture


def add_show(command: argparse.ArgumentParser) -> None:
    """Adds the options of `papr-fx show`."""
    command.set_defaults(run=run_show)
    command.add_argument("file", type=Path, help="an image or a video")
    add_picture(command)


def run_show(arguments: argparse.Namespace) -> None:
    """Runs `papr-fx show`."""
    check_picture(arguments.out)
    _check_kept(arguments.file, arguments.out)
    if _is_clip(arguments.file, arguments.model):
        from .clips import show_clip

        show_clip(arguments, arguments.file)
        return
    image = read_image(arguments.file)
    arguments.model = arguments.model or DEFAULT_MODEL
    print(f"model: {arguments.model}\nproposal: {arguments.proposal}")
    draw_image(arguments, prune_image(arguments, image))


def _check_kept(file: Path, out: Path) -> None:
    """Refuses to write over the file that is shown: of a clip, an annotated one is written beside the picture."""
    written = (out, out.with_suffix(".mp4"))
    if any(path.exists() and file.exists() and path.samefile(file) for path in written):
        raise ArgumentError(f"--out {out} would write over {file}: give another name")


def _is_clip(file: Path, model: str) -> bool:
    """Whether a file is shown as a clip: a video, or an animation unless the model takes images.

    Raises:
        ArgumentError: The file is empty or damaged, or does not fit the model.
    """
    takes_images = timm.is_model(model) or model.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    takes_clips = model in VIDEO_MODELS or Path(model or file).is_dir()
    animated = is_animation(file)
    if animated is None:
        if file.suffix.lower() in IMAGE_SUFFIXES:
            read_image(file)  # says why it holds no image
        if takes_images:
            raise ArgumentError(f"{model} takes images, and Pillow finds none in {file}: for a clip give a video model")
        return True
    if takes_clips and not animated:
        raise ArgumentError(f"{model} takes clips, and {file} is one image: give the name of a timm model")
    if takes_images and animated:
        print(f"note: {file} is an animation, and {model} takes images: its first frame is shown", file=sys.stderr)
    return animated and not takes_images
