"""The server of examples/serve.py under load: every answer is the model's own, at the keep ratio that the answer names."""

import argparse
import http.client
import io
import json
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import papr_fx
from examples import serve

from .models import Shape, ToyViT, enliven, toy_proposal

SIDE, MOST = 16, 32
CONFIG = {"input_size": (3, SIDE, SIDE), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}


def vit(side, patch_size, classes=7):
    options = {"depth": 1, "num_classes": classes, "embed_dim": 48, "img_size": side, "patch_size": patch_size}
    return enliven(timm.create_model("vit_tiny_patch16_224", **options)).eval()


def pruned():
    return papr_fx.transform(vit(SIDE, 2), toy_proposal(), 0.5, verify=False)


def options(**changed):
    given = {"z": 0.5, "busy_z": None, "max_batch": MOST, "deadline": 5.0, "no_compile": True, "device": "cpu"}
    return argparse.Namespace(**given | {"host": "127.0.0.1", "port": 0} | changed)


@pytest.fixture(scope="module")
def served():
    """A server of a pruned model at 0.5, or 0.2 when busy."""
    gm = pruned()
    server = serve.Server(gm, CONFIG, options(busy_z=0.2))
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


def odd_exif():
    """A photograph that is to be turned, with a text among the numbers of its EXIF."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    Image.new("RGB", (16, 16)).save(file, "jpeg", exif=exif)
    return file.getvalue().replace(b"\x01\x0f\x00\x02", b"\x01\x3f\x00\x02", 1)


def send(server, path, body=None, method="POST", headers=()):
    """The status and the JSON that the server answers."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, body, dict(headers))
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def own_answers(server, bodies, ratios):
    """What the model says of each image, alone, at each keep ratio: scores of all classes."""
    gm = pruned()
    prepared = [server.prepare(Image.open(io.BytesIO(body)).convert("RGB")) for body in bodies]
    found = {}
    for z in ratios:
        papr_fx.set_keep_ratio(gm, z)
        with torch.no_grad():
            found[z] = [gm(image[None])[0].softmax(-1).tolist() for image in prepared]
    return found


def agrees(answer, scores):
    best = sorted(range(len(scores)), key=lambda c: -scores[c])[:5]
    return [found["class"] for found in answer["top5"]] == best and all(
        abs(found["score"] - scores[found["class"]]) < 1e-5 for found in answer["top5"]
    )


def test_load(served):
    """160 requests from 8 threads, while the ratio changes and damaged images come in between."""
    bodies = [png(seed) for seed in range(16)]
    served.worker.sizes.clear()
    ratios = (0.5, 0.3, 0.2, 1.0)
    known = own_answers(served, bodies, ratios)
    distinct = {tuple(round(score, 4) for score in scores) for answers in known.values() for scores in answers}
    assert len(distinct) == len(ratios) * len(bodies)  # so that an answer of another image or ratio shows
    stop = threading.Event()
    changed = Counter()

    def change():
        while not stop.wait(0.02):
            z = (0.3, 0.5, 1.0)[changed.total() % 3]
            assert send(served, "/keep-ratio", json.dumps({"z": z})) == (200, {"z": z})
            changed[z] += 1

    def ask(number):
        if number % 10 == 9:
            return number, *send(served, "/classify", bodies[0][: 100 + number])
        return number, *send(served, "/classify", bodies[number % len(bodies)])

    with ThreadPoolExecutor(9) as pool:
        changing = pool.submit(change)
        answers = list(pool.map(ask, range(160)))
        stop.set()
        changing.result()
    seen = Counter()
    for number, status, found in answers:
        if number % 10 == 9:
            assert status == 400
            assert "no JPEG or PNG" in found["error"]
        else:
            assert status == 200
            assert agrees(found, known[found["z"]][number % len(bodies)]), found
            seen[found["z"]] += 1
    assert changed.total() >= 3
    assert len(seen) >= 2
    assert {*served.worker.sizes} <= {*range(1, MOST + 1)}
    assert sum(size * count for size, count in served.worker.sizes.items()) == 144
    assert max(served.worker.sizes) > 1


def test_health(served):
    assert send(served, "/keep-ratio", b'{"z": 0.5}')[0] == send(served, "/classify", png(1))[0] == 200
    status, found = send(served, "/health", method="GET")
    assert (status, found["z"], found["asked"], found["waiting"]) == (200, 0.5, 0.5, 0)
    assert found["batches"]["1"] >= 1
    assert send(served, "/other", method="GET")[0] == 404


def waiting(count):
    """Images in a row, as the worker gets them."""
    drawn = torch.randn(count, *CONFIG["input_size"], generator=torch.Generator().manual_seed(count))
    return [serve.Job(serve.CLASSIFY, image) for image in drawn]


def test_the_ratio_falls_while_many_wait():
    worker = serve.Worker(pruned(), CONFIG["input_size"], options(busy_z=0.2, max_batch=8))
    jobs = waiting(20)
    for job in jobs:
        worker.jobs.put(job)
    worker.start()
    assert [job.answer.result(60)["z"] for job in jobs] == [0.2] * 16 + [0.5] * 4  # 12, 4 and 0 are waiting behind a batch
    assert worker.sizes == {8: 2, 4: 1}
    worker.ask(serve.Job(serve.CHANGE, 0.1)).result(60)
    assert (worker.z, worker.asked) == (0.1, 0.1)
    worker.jobs.put(serve.Job(serve.STOP))
    worker.join(60)
    assert not worker.is_alive()


def test_what_waits_is_answered_before_the_worker_stops():
    worker = serve.Worker(pruned(), CONFIG["input_size"], options(max_batch=8))
    jobs = waiting(20)
    for job in [serve.Job(serve.STOP), *jobs, serve.Job(serve.CHANGE, 0.3)]:
        worker.jobs.put(job)
    worker.run()
    assert all(job.answer.result(0)["z"] == 0.3 for job in jobs)  # a change goes first


def test_a_batch_that_fails_harms_no_other(monkeypatch):
    worker = serve.Worker(pruned(), CONFIG["input_size"], options())
    worker.start()
    for wrong in (torch.zeros(3, 1, 1), torch.zeros(3, 1), None):
        assert isinstance(
            worker.ask(serve.Job(serve.CLASSIFY, wrong)).exception(60), papr_fx.PaprError | IndexError | TypeError
        )
    assert worker.ask(waiting(1)[0]).result(60)["z"] == 0.5
    monkeypatch.setattr(serve, "MOST_WAITING", 0)
    with pytest.raises(serve.RefusedError, match="ask again later"):
        worker.ask(waiting(1)[0])
    worker.jobs.put(serve.Job(serve.STOP))
    worker.join(60)


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "said"),
    [
        ("/classify", b"", {}, 400, "no JPEG or PNG"),
        ("/classify", png(0)[:-200], {}, 400, "no JPEG or PNG"),
        ("/classify", odd_exif(), {}, 400, "no JPEG or PNG"),
        ("/classify", png(0, 64, 64), {}, 400, "the image has 64 x 64 pixels; at most 4000, and"),
        ("/classify", png(0, 300, 1), {}, 400, "the image has 1 x 300 pixels; at most 4000, and"),
        ("/classify", b"few", {"Content-Length": "20000001"}, 413, "at most 20000000 are read"),
        ("/classify", png(0), {"Content-Length": "-1"}, 411, "Content-Length"),
        ("/classify", png(0), {"Content-Length": "9" * 5000}, 411, "Content-Length"),
        ("/keep-ratio", b"[" * 200_000, {}, 400, '{"z": 0.3}'),
        ("/keep-ratio", b"0.3", {}, 400, '{"z": 0.3}'),
        ("/keep-ratio", b'{"z": 0}', {}, 400, "z must lie"),
        ("/keep-ratio", b'{"z": "half"}', {}, 400, "must be a number"),
        ("/none", b"", {}, 404, "POST /classify"),
    ],
)
def test_what_is_refused(served, path, body, headers, status, said, monkeypatch):
    monkeypatch.setattr(serve, "MOST_PIXELS", 4000)
    found, answer = send(served, path, body, headers=headers)
    assert found == status
    assert said.replace("z must", "z (the share of tokens kept) must") in answer["error"]
    assert send(served, "/classify", png(1))[0] == 200


def test_nothing_is_compiled_after_the_warm_up():
    """Batches of 1 to 32, at both ratios: eager code stands in for what is compiled, with the same guards."""
    torch.compiler.reset()
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph

    shape = Shape(depth=1)
    gm = papr_fx.transform(enliven(ToyViT(shape)).eval().float(), toy_proposal(), 0.5, verify=False)
    worker = serve.Worker(gm, (3, *shape.image), options(no_compile=False, backend=count, busy_z=0.2))
    worker.follow(0.2)
    worker.follow(0.5)
    assert len(compiled) == 6  # for each ratio: one image, more, and 16 and more, for the convolutions of a CPU
    for z in (0.5, 0.2):
        worker.asked = z
        for size in range(1, MOST + 1):
            images = torch.randn(size, 3, *shape.image)
            found = worker.classify([serve.Job(serve.CLASSIFY, image) for image in images])
            assert [answer["z"] for answer in found] == [z] * size
    assert len(compiled) == 6


def test_from_start_to_stop(tmp_path, capsys, monkeypatch):
    """As on the command line, until SIGTERM."""
    timm.models.save_for_hf(timm.create_model("test_resnet"), tmp_path)
    torch.save({"state_dict": vit(64, 16, 3).state_dict()}, tmp_path / "model.pt")
    answers, before = [], {*threading.enumerate()}
    monkeypatch.setattr(serve.Server, "serve_forever", watched(serve.Server.serve_forever, answers))
    arguments = ["--model", "vit_tiny_patch16_224", "--checkpoint", str(tmp_path / "model.pt"), "--z", "0.25", "--port", "0"]
    arguments += ["--proposal", f"local-dir:{tmp_path}", "--no-compile", "--device", "cpu"]
    serve.main([*arguments, "--model-kwargs", "depth=1", "img_size=64", "num_classes=3", "embed_dim=48"])
    printed = capsys.readouterr().out
    assert printed.startswith("http://")
    assert printed.endswith("stops\n")
    ((status, found),) = answers
    assert (status, found["z"]) == (200, 0.25)
    assert sorted(best["class"] for best in found["top5"]) == [0, 1, 2]
    assert {*threading.enumerate()} <= before


def watched(forever, answers):
    """Asks the server once, and then stops the process."""

    def serving(server):
        def visit():
            answers.append(send(server, "/classify", png(3)))
            signal.raise_signal(signal.SIGTERM)

        threading.Thread(target=visit).start()
        forever(server, 0.01)

    return serving
