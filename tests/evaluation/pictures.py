"""Small noise images in files, tar files and readers, what must come back from them, and an object that does harm."""

import io
import tarfile
from pathlib import Path

import torch
from PIL import Image

from papr_fx.evaluation.decoders import ImageDecoder
from papr_fx.evaluation.readers import Source, open_reader
from papr_fx.evaluation.samples import Samples

# timm leaves the tar files open that it reads.
LEFT_OPEN = "ignore:.*name='.*tar':pytest.PytestUnraisableExceptionWarning"


def noise(seed):
    """The bytes of a small PNG image."""
    pixels = torch.randint(256, (12, 15, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "png")
    return file.getvalue()


def to_tensor(image):
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(12, 15, 3)


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def read_all(reader):
    data = Samples(reader, ImageDecoder(to_tensor), (12, 15, 3))
    return [data[i] for i in range(len(data))]


def opened(data, **options):
    return open_reader(Source(data, **options))


def expected(number):
    with Image.open(io.BytesIO(noise(number))) as image:
        return to_tensor(image.convert("RGB"))


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)
