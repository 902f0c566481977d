"""`papr-fx show`: what a model keeps of an image or a clip, as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ArgumentError
from .images import draw_image, prune_image
from .options import DEFAULT_MODEL, add_picture, check_picture

if TYPE_CHECKING:
    from PIL.Image import Image


def add_show(command: argparse.ArgumentParser) -> None:
    """Adds the options of `papr-fx show`."""
    command.set_defaults(run=run_show)
    command.add_argument("file", type=Path, help="an image or a video")
    add_picture(command)


def run_show(arguments: argparse.Namespace) -> None:
    """Runs `papr-fx show`."""
    check_picture(arguments.out)
    image = _image(arguments.file)
    if image is None:
        from .clips import show_clip

        show_clip(arguments, arguments.file)
        return
    arguments.model = arguments.model or DEFAULT_MODEL
    print(f"model: {arguments.model}\nproposal: {arguments.proposal}")
    draw_image(arguments, prune_image(arguments, image))


def _image(file: Path) -> Image | None:
    """The image in a file; None if the file holds an animation, or is not an image.

    A photograph may hold several frames without being an animation: phones write such JPEG files.
    """
    from PIL import UnidentifiedImageError
    from PIL.Image import DecompressionBombError
    from PIL.Image import open as open_image

    try:
        with open_image(file) as opened:
            animated = opened.format in ("GIF", "WEBP", "PNG") and getattr(opened, "is_animated", False)
            image = opened.convert("RGB")
    except UnidentifiedImageError:
        return None
    except (OSError, DecompressionBombError) as error:
        raise ArgumentError(f"cannot read an image from {file}: {error}") from error
    return None if animated else image
