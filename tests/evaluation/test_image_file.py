"""Image files as a viewer shows them: upright, 8 bits, transparency over white, the first frame; and what is refused."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

import papr_fx
from papr_fx.evaluation.decoders import ImageDecoder
from papr_fx.evaluation.image_file import is_animation, read_image


def pixels_of(image):
    assert image.mode == "RGB"
    return np.asarray(image)


def stored(image, suffix, **options):
    file = io.BytesIO()
    image.save(file, suffix, **options)
    file.seek(0)
    return file


def arrow():
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, :, 0] = 200
    pixels[:, 5, 1] = 100
    return Image.fromarray(pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
def test_images_are_upright(orientation, suffix):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    found = pixels_of(read_image(stored(arrow(), suffix, exif=exif, **options)))
    again = Image.open(stored(arrow(), "png", exif=exif))
    again.load()
    np.testing.assert_array_equal(found, np.asarray(ImageOps.exif_transpose(again)))
    assert found.shape[:2] == ((6, 4) if orientation > 4 else (4, 6))


def test_decoders_turn_images():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    decode = ImageDecoder(lambda image: torch.zeros(image.size))
    assert decode(stored(arrow(), "jpeg", exif=exif)).shape == (4, 6)  # width, height


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
@pytest.mark.parametrize("exif", [b"Exif\0\0no TIFF at all", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
def test_damaged_exif_does_not_cost_the_image(exif):
    assert pixels_of(read_image(stored(arrow(), "jpeg", exif=exif))).shape == (4, 6, 3)


@pytest.mark.parametrize("suffix", ["png", "tiff", "ppm"])
def test_sixteen_bits_are_scaled_to_eight(suffix):
    levels = np.array([[0, 257, 32896, 65535]], np.uint16)
    found = pixels_of(read_image(stored(Image.fromarray(levels), suffix)))
    assert found[0, :, 0].tolist() == [0, 1, 128, 255]
    assert (found == found[..., :1]).all()


def test_white_is_zero_in_sixteen_bits_too():
    file = stored(Image.fromarray(np.array([[0, 65535]], np.uint16)), "tiff", tiffinfo={262: 0})
    assert pixels_of(read_image(file))[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize(
    "levels", [np.array([[-1.0, 0.0, 1.0]], np.float32), np.array([[-70000, 0, 70000]], np.int32)], ids=["float", "32 bits"]
)
def test_other_ranges_are_the_images_own(levels):
    assert pixels_of(read_image(stored(Image.fromarray(levels), "tiff")))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(("values", "message"), [([0.5, 0.5], "all its values are 0.5"), ([0.0, float("nan")], "not finite")])
def test_ranges_that_say_nothing_are_refused(values, message):
    file = stored(Image.fromarray(np.array([values], np.float32)), "tiff")
    with pytest.raises(papr_fx.ArgumentError, match=f"cannot read an image from memory: .*{message}"):
        read_image(file)


def transparent_images():
    hidden = (10, 20, 30, 0)
    colours = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    colours.putpixel((1, 0), hidden)
    yield "RGBA", stored(colours, "png")
    yield "LA", stored(colours.convert("LA"), "png")
    yield "webp", stored(colours, "webp", lossless=True, exact=True)
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    yield "P", stored(palette, "png", transparency=1)
    yield "GIF", stored(palette, "gif", transparency=1)
    yield "RGB", stored(colours.convert("RGB"), "png", transparency=hidden[:3])
    deep = np.array([[65535 // 2, 300]], np.uint16)
    yield "I;16", stored(Image.fromarray(deep), "png", transparency=300)


@pytest.mark.parametrize(("kind", "file"), [*transparent_images()], ids=lambda value: value if isinstance(value, str) else "")
def test_transparent_pixels_are_white(kind, file):
    found = pixels_of(read_image(file))
    assert found[0, 1].tolist() == [255, 255, 255]
    assert found[0, 0].max() < 255


def test_half_transparent_pixels_mix_with_white():
    file = stored(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "png")
    assert pixels_of(read_image(file))[0, 0].tolist() == [127, 127, 127]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_the_first_frame_of_an_animation(suffix, tmp_path):
    frames = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (250, 100, 0)]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    assert is_animation(path)
    assert abs(int(pixels_of(read_image(path))[0, 0, 0]) - 250) < 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"<html>404 not found</html>", "it holds text"),
        (bytes(range(256)) * 3, "it holds no image of a format that Pillow reads"),
        (struct.pack(">I4s4s", 24, b"ftyp", b"heic") + bytes(range(128, 256)), "HEIF.*convert it to JPEG or PNG"),
        (stored(arrow(), "png").getvalue()[:60], "truncated"),
    ],
    ids=["empty", "text", "bytes", "heic", "cut"],
)
def test_the_reason_why_a_file_is_no_image(content, reason, tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(papr_fx.ArgumentError, match=f"cannot read an image from {path}: .*{reason}"):
        read_image(path)
    with path.open("rb") as source, pytest.raises(papr_fx.ArgumentError, match=f"cannot read an image from {path}: .*{reason}"):
        read_image(source)
