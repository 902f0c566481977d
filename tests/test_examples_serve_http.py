"""What the server of examples/serve.py makes of images, of slow or broken requests, and of those that it refuses."""

import io
import socket
import struct

import numpy as np
import pytest
import torch
from PIL import Image

import papr_fx
from examples import serve
from papr_fx.evaluation.image_file import read_image

from .served import agrees, png, pruned, running, send


@pytest.fixture(scope="module")
def served():
    with running() as server:
        yield server


def odd_exif():
    """A photograph that is to be turned, with a text among the numbers of its EXIF."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    Image.new("RGB", (16, 16)).save(file, "jpeg", exif=exif)
    return file.getvalue().replace(b"\x01\x0f\x00\x02", b"\x01\x3f\x00\x02", 1)


def deep_grey():
    """A PNG of 16 bits: a ramp from black to white."""
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 40 * 40).astype(np.uint16).reshape(40, 40)).save(file, "png")
    return file.getvalue()


def transparent():
    """A PNG of which one half is transparent, with colours that nobody sees."""
    pixels = np.random.default_rng(0).integers(256, size=(40, 40, 4), dtype=np.uint8)
    pixels[:20, :, 3], pixels[20:, :, 3] = 0, 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("body", [deep_grey(), transparent(), odd_exif()])
def test_images_are_read_as_everywhere(served, body):
    status, found = send(served, "/classify", body)
    image = read_image(io.BytesIO(body))
    assert status == 200
    gm = pruned()
    papr_fx.set_keep_ratio(gm, found["z"])
    with torch.no_grad():
        assert agrees(found, gm(served.prepare(image)[None])[0].softmax(-1).tolist())


def talk(server, sent, *more):
    """The first line of what the server answers to these bytes, and whether it then takes `more`."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as client, client.makefile("rb") as answers:
        client.sendall(sent)
        lines = [answers.readline()]
        for part in more:
            client.sendall(part)
            lines += [line for line in answers if line.startswith(b"HTTP")]
        return [line.split()[1] for line in lines if line]


def test_slow_and_broken_uploads(served, monkeypatch, capsys):
    head = b"POST /classify HTTP/1.1\r\nContent-Length: %d\r\n%s\r\n"
    body = png(0)
    expecting = head % (len(body), b"Expect: 100-continue\r\n")
    assert talk(served, expecting, body) == [b"100", b"200"]  # the client need not wait
    with monkeypatch.context() as patch:
        patch.setattr(serve.Handler, "timeout", 0.1)
        assert talk(served, head % (len(body), b"") + body[:-1]) == [b"408"]  # stalled
    with monkeypatch.context() as patch:
        patch.setattr(serve, "MOST_UPLOAD", 0.1)
        assert talk(served, head % (len(body), b"") + body[:-1]) == [b"408"]  # too slow
        assert talk(served, head % (20_000_001, b"") + body) == [b"413"]  # not drained for ever
        assert talk(served, b"POST /classify HTTP/1.1\r\nContent-Length: 1\r\n") == [b"408"]  # nor its head read
    assert send(served, "/none", bytes(8_000_000))[0] == 404  # the client hears it, although its body is not looked at
    with socket.create_connection(("127.0.0.1", served.server_port)) as client:
        client.sendall(head % (len(body), b"") + body[:-1])
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # hangs up at once
    assert send(served, "/classify", body)[0] == 200
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "said"),
    [
        ("/classify", b"", {}, 400, "no JPEG or PNG"),
        ("/classify", b"GIF89a", {}, 400, "no JPEG or PNG"),
        ("/classify", png(0)[:-200], {}, 400, "cannot read an image"),
        ("/classify", png(0, 64, 64), {}, 400, "Image size (4096 pixels) exceeds limit of 4000 pixels"),
        ("/classify", png(0, 100, 100), {}, 400, "Image size (10000 pixels) exceeds limit of 8000 pixels"),
        ("/classify", png(0, 300, 1), {}, 400, "the image has 1 x 300 pixels: one side is over 50 times the other"),
        ("/classify", b"few", {"Content-Length": "20000001"}, 413, "at most 20000000 are read"),
        ("/classify", png(0), {"Content-Length": "-1"}, 411, "Content-Length"),
        ("/classify", png(0), {"Content-Length": "9" * 5000}, 411, "Content-Length"),
        ("/keep-ratio", b"[" * 200_000, {}, 400, '{"z": 0.3}'),
        ("/keep-ratio", b"0.3", {}, 400, '{"z": 0.3}'),
        ("/keep-ratio", b'{"z": 0}', {}, 400, "z must lie"),
        ("/keep-ratio", b'{"z": "half"}', {}, 400, "must be a number"),
        ("/keep-ratio", b'{"z": 1' + 400 * b"0" + b"}", {}, 400, "z must lie"),
        ("/none", b"", {}, 404, "POST /classify"),
    ],
)
def test_what_is_refused(served, path, body, headers, status, said, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    found, answer = send(served, path, body, headers=headers)
    assert found == status
    assert said.replace("z must", "z (the share of tokens kept) must") in answer["error"]
    assert send(served, "/classify", png(1))[0] == 200
