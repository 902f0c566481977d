"""The server of examples/serve.py with a small model, and what is asked of it."""

import argparse
import http.client
import io
import json
import threading
from contextlib import contextmanager

import numpy as np
import timm
from PIL import Image

import papr_fx
from examples import serve

from .models import enliven, toy_proposal

SIDE, MOST = 16, 32
CONFIG = {"input_size": (3, SIDE, SIDE), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}


def vit(side, patch_size, classes=7):
    options = {"depth": 1, "num_classes": classes, "embed_dim": 48, "img_size": side, "patch_size": patch_size}
    return enliven(timm.create_model("vit_tiny_patch16_224", **options)).eval()


def pruned():
    return papr_fx.transform(vit(SIDE, 2), toy_proposal(), 0.5, verify=False)


def options(**changed):
    given = {"z": 0.5, "busy_z": None, "ratios": [], "max_batch": MOST, "deadline": 5.0, "no_compile": True, "device": "cpu"}
    return argparse.Namespace(**given | {"host": "127.0.0.1", "port": 0} | changed)


@contextmanager
def running():
    """A server of a pruned model at 0.5, or 0.2 when busy."""
    server = serve.Server(pruned(), CONFIG, options(busy_z=0.2))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def png(seed, height=40, width=40):
    pixels = np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def send(server, path, body=None, method="POST", headers=()):
    """The status and the JSON that the server answers."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, body, dict(headers))
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def agrees(answer, scores):
    best = sorted(range(len(scores)), key=lambda c: -scores[c])[:5]
    return [found["class"] for found in answer["top5"]] == best and all(
        abs(found["score"] - scores[found["class"]]) < 1e-5 for found in answer["top5"]
    )
