"""The server of examples/serve.py under load: every answer is the model's own, at the keep ratio that the answer names."""

import io
import json
import signal
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from PIL import Image

import papr_fx
from examples import serve

from .models import Shape, ToyViT, enliven, toy_proposal
from .served import CONFIG, MOST, agrees, options, png, pruned, running, send, vit


@pytest.fixture(scope="module")
def served():
    with running() as server:
        yield server


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
            assert "cannot read an image" in found["error"]
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


def test_a_compiled_server_takes_the_ratios_that_it_compiled():
    """Each other one would hold all requests for a compilation, and a compiled model takes a limited number."""
    worker = serve.Worker(pruned(), CONFIG["input_size"], options(no_compile=False, backend="eager", ratios=[0.3], busy_z=0.2))
    worker.ask(serve.Job(serve.CHANGE, 0.3))
    for z in (0.4, [0.3], {}, "0.3", None):
        with pytest.raises(serve.RefusedError, match=r"z must be one of \[0.5, 0.3, 0.2\]"):
            worker.ask(serve.Job(serve.CHANGE, z))


def test_changes_hold_no_image():
    """Between two changes of a flood a batch is answered; each change goes before the images that wait."""
    worker = serve.Worker(pruned(), CONFIG["input_size"], options(max_batch=1))
    images, changes = waiting(3), [serve.Job(serve.CHANGE, z) for z in (0.3, 0.2, 7.0)]
    for job in (*images, *changes, serve.Job(serve.STOP)):
        worker.jobs.put(job)
    more = serve.Job(serve.CHANGE, 0.4)
    images[0].answer.add_done_callback(lambda _: worker.jobs.put(more))
    worker.run()
    assert [job.answer.result(0)["z"] for job in (*images, *changes[:2], more)] == [0.2, 0.4, 0.4, 0.3, 0.2, 0.4]
    assert isinstance(changes[2].answer.exception(0), papr_fx.ArgumentError)


def test_what_nobody_waits_for_is_not_computed(served, monkeypatch):
    worker = serve.Worker(pruned(), CONFIG["input_size"], options(max_batch=1))
    jobs = waiting(3)
    monkeypatch.setattr(serve, "SECONDS", 0.01)
    with pytest.raises(serve.RefusedError, match=r"no answer within 0.01 s"):
        serve.Handler.answer(None, worker.ask(jobs[0]))
    assert jobs[0].answer.cancelled()
    for job in (*jobs[1:], serve.Job(serve.STOP)):
        worker.jobs.put(job)
    worker.run()
    assert worker.sizes == {1: 2}


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
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # as it was, afterwards
    monkeypatch.setattr(serve.Server, "serve_forever", watched(serve.Server.serve_forever, answers))
    monkeypatch.setattr(serve, "MOST_PIXELS", 5000)
    warnings.simplefilter("default")  # as without pytest
    arguments = ["--model", "vit_tiny_patch16_224", "--checkpoint", str(tmp_path / "model.pt"), "--z", "0.25", "--port", "0"]
    arguments += ["--proposal", f"local-dir:{tmp_path}", "--no-compile", "--device", "cpu"]
    serve.main([*arguments, "--model-kwargs", "depth=1", "img_size=64", "num_classes=3", "embed_dim=48"])
    printed = capsys.readouterr().out
    assert printed.startswith("http://")
    assert printed.endswith("stops\n")
    (refusal, (status, found)) = answers
    assert refusal[0] == 400
    assert "Image size (6400 pixels) exceeds limit of 5000 pixels" in refusal[1]["error"]
    assert (status, found["z"]) == (200, 0.25)
    assert sorted(best["class"] for best in found["top5"]) == [0, 1, 2]
    assert {*threading.enumerate()} <= before


def watched(forever, answers):
    """Asks the server twice, and then stops the process."""

    def serving(server):
        def visit():
            try:
                answers.extend(send(server, "/classify", png(3, side, side)) for side in (80, 40))
            finally:
                signal.raise_signal(signal.SIGTERM)

        threading.Thread(target=visit).start()
        forever(server, 0.01)

    return serving
