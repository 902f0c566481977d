"""Opens an image file as a person would see it: upright, its first frame, in 8-bit RGB, transparency over white."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import IO, Any, cast

import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from ..errors import ArgumentError

IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
BACKGROUND = (255, 255, 255)  # what shows through transparent pixels

# What Pillow raises for a file that is damaged, too large, or in an encoding that it does not read (`RuntimeError`).
_DAMAGED = (
    *(OSError, SyntaxError, EOFError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError),
    *(AssertionError, struct.error, zlib.error, Image.DecompressionBombError),
    Image.DecompressionBombWarning,  # where the user makes it an error
)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of TIFF


def read_image(source: str | Path | IO[bytes]) -> Image.Image:
    """Opens an image file, and converts it to what a viewer shows.

    The first frame of an animation is taken. The image is turned as its EXIF orientation says. Transparent pixels are put
    over white. Grey images of 16 bits are scaled to 8; those of floating point or of 32 bits are scaled from their own
    smallest and largest value.

    Args:
        source: A file that Pillow can read, by name or opened.

    Returns:
        An RGB image.

    Raises:
        ArgumentError: The file cannot be read, or is no image; the message says which.
    """
    name = source if isinstance(source, str | Path) else getattr(source, "name", "memory")
    try:
        with Image.open(source) as opened:
            opened.load()  # TIFF is turned here, and PNG reads its EXIF
            image = _to_rgb(opened)
            turn = _TURNS.get(_orientation(opened))
    except UnidentifiedImageError as error:
        raise ArgumentError(f"cannot read an image from {name}: {_what_else(source)}") from error
    except _DAMAGED as error:
        raise ArgumentError(f"cannot read an image from {name}: {error or type(error).__name__}") from error
    return image if turn is None else image.transpose(turn)


def is_animation(path: Path) -> bool | None:
    """Whether a file is an animation; None if Pillow finds no image in it.

    A photograph may hold several frames without being an animation: phones write such JPEG files.

    Raises:
        ArgumentError: The file cannot be read.
    """
    try:
        with Image.open(path) as opened:
            return opened.format in ("AVIF", "GIF", "PNG", "WEBP") and bool(getattr(opened, "is_animated", False))
    except UnidentifiedImageError:
        return None
    except _DAMAGED as error:
        raise ArgumentError(f"cannot read an image from {path}: {error or type(error).__name__}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), layer).convert("RGB")
    return image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """A grey image of more than 8 bits, as 8-bit RGB."""
    tags: Any = getattr(image, "tag_v2", {})
    levels = _levels(image)  # (H, W)
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    low, high = (0.0, 2.0**bits - 1) if deep else (float(levels.min()), float(levels.max()))
    if not torch.isfinite(levels).all():
        raise ValueError("some of its values are not finite: replace them, and save it with 8 or 16 bits")
    if low == high:
        raise ValueError(f"all its values are {low:g}, so they say no range: save it with 8 or 16 bits")
    grey = ((levels - low) / (high - low)).clamp(0, 1)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 1 - grey
    hidden: Any = image.info.get("transparency")
    if isinstance(hidden, int):  # the one level that is transparent
        grey = torch.where(levels == hidden, BACKGROUND[0] / 255, grey)
    pixels = (grey * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.numpy()).convert("RGB")


def _levels(image: Image.Image) -> Tensor:
    """The values of a grey image (H, W), float64."""
    values = torch.frombuffer(bytearray(image.convert("F").tobytes()), dtype=torch.float32)
    if image.mode == "I":
        values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.int32)
    return values.double().view(image.height, image.width)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, if the file states none."""
    try:
        found = cast(object, image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DAMAGED:  # a photograph whose EXIF is damaged is still a photograph, as in browsers
        return 1
    return found if isinstance(found, int) else 1


def _what_else(source: str | Path | IO[bytes]) -> str:
    """What a file holds in which Pillow finds no image."""
    if isinstance(source, str | Path):
        with Path(source).open("rb") as file:
            content = file.read(512)
    else:
        source.seek(0)
        content = source.read(512)
    if not content:
        return "it is empty"
    if content[4:8] == b"ftyp" and content[8:12] in (b"heic", b"heix", b"heif", b"mif1", b"msf1"):
        return "it is a HEIF image, which Pillow does not read: convert it to JPEG or PNG"
    try:
        content.decode()
    except UnicodeDecodeError:
        return "it holds no image of a format that Pillow reads"
    return "it holds text"
