"""Serves a pruned classifier over HTTP, in batches. `python -m examples.serve --no-compile`.

    curl --data-binary @photograph.jpg http://127.0.0.1:8000/classify
    curl --data '{"z": 0.3}' http://127.0.0.1:8000/keep-ratio
    curl http://127.0.0.1:8000/health

One thread owns the model: it gathers requests into batches, changes the keep ratio between two of them, and with `--busy-z`
lowers it while many wait. Each answer names its ratio. All ratios are compiled at the start: `--ratios` names those that may
be asked for. Weights are random unless `--pretrained` or `--checkpoint` is given; those of the proposal `lite0` come with
pip. docs/serve.md explains it.
"""

import argparse
import io
import json
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections import Counter
from concurrent import futures
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty, PriorityQueue
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.utils import ParseKwargs
from torch import Tensor

import papr_fx
from papr_fx.evaluation.image_file import read_image

MOST_BYTES, MOST_PIXELS = 20_000_000, 50_000_000  # of an image, as it is sent and when it is decoded (Pillow refuses it)
LONGEST = 50  # times the shorter side
MOST_WAITING, SECONDS, MOST_UPLOAD = 1024, 120.0, 30.0  # images in the queue; how long an answer, and a body, may take
SIGNATURES = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"  # how JPEG and PNG files begin
CHANGE, CLASSIFY, STOP = range(3)  # what goes first


class RefusedError(Exception):
    """The status of an answer, and what is wrong with the request."""


@dataclass(order=True)
class Job:
    """An image (3, H, W) to classify, or a keep ratio to set, and the answer to come."""

    kind: int
    given: Any = field(default=None, compare=False)
    since: float = field(default_factory=time.monotonic)
    answer: futures.Future[Any] = field(default_factory=futures.Future[Any], compare=False)


class Worker(threading.Thread):
    """Gathers jobs that other threads hand in, and has one thread run the model."""

    def __init__(self, gm: papr_fx.PrunedModule, size: tuple[int, ...], given: argparse.Namespace) -> None:
        super().__init__(daemon=True)
        self.gm, self.size, self.given = gm, size, given
        self.model = gm if given.no_compile else torch.compile(gm, fullgraph=True, backend=given.backend)
        self.z = self.asked = given.z  # in force, and asked for
        self.ratios = [given.z, *given.ratios, *([] if given.busy_z is None else [given.busy_z])]
        self.warm: set[float] = set()
        self.sizes: Counter[int] = Counter()  # how many batches of each size
        self.jobs: PriorityQueue[Job] = PriorityQueue()

    def ask(self, job: Job) -> futures.Future[Any]:
        """Hands a job in, from any thread; returns its answer to come."""
        if job.kind == CHANGE and not self.given.no_compile and job.given not in self.ratios:
            raise RefusedError(400, f"z must be one of {self.ratios}, which are compiled; --ratios takes more")
        if self.jobs.qsize() >= MOST_WAITING:
            raise RefusedError(503, f"{MOST_WAITING} requests are waiting: ask again later")
        self.jobs.put(job)
        return job.answer

    def run(self) -> None:
        """Works until it is told to stop; all images that came before have been answered then."""
        with futures.ThreadPoolExecutor(1, "model") as model:
            while jobs := self.gather():
                wanted = [job for job in jobs if job.answer.set_running_or_notify_cancel()]  # nobody waits for the others
                images = [job for job in wanted if job.kind == CLASSIFY]
                for work in [*([job] for job in wanted if job.kind == CHANGE), *([images] if images else [])]:
                    done = model.submit(self.retarget if work[0].kind == CHANGE else self.classify, work)
                    error = done.exception()
                    for place, job in enumerate(work):
                        job.answer.set_exception(error) if error else job.answer.set_result(done.result()[place])

    def gather(self) -> list[Job]:
        """Changes of the ratio, and a batch: what comes within `--deadline` of its first image. Nothing, to stop."""
        jobs, images = [self.jobs.get()], list[Job]()
        while jobs[0].kind != STOP and len(images := [job for job in jobs if job.kind == CLASSIFY]) < self.given.max_batch:
            end = images[0].since + self.given.deadline / 1e3 if images else 0.0
            try:
                job = self.jobs.get(timeout=min(max(0.0, end - time.monotonic()), SECONDS))
            except Empty:
                break
            if job.kind == STOP:
                self.jobs.put(job)  # after this batch
                break
            jobs.append(job)
        return [job for job in jobs if job.kind != STOP]

    def retarget(self, jobs: list[Job]) -> list[dict[str, Any]]:
        """Sets the keep ratio that was asked for."""
        self.asked = self.follow(jobs[0].given)
        return [{"z": self.z}]

    def follow(self, z: float) -> float:
        """Sets a keep ratio. A new one is compiled at once: for one image, for more, and for full batches."""
        papr_fx.set_keep_ratio(self.gm, z)
        self.z = z
        known, most = z in self.warm or self.given.no_compile, self.given.max_batch
        for count in () if known else sorted({1, min(2, most), most}):  # the size becomes a variable at the second one
            self.logits(torch.zeros(count, *self.size))
        self.warm.add(z)
        return z

    def classify(self, jobs: list[Job]) -> list[dict[str, Any]]:
        """The five best classes of each image. The ratio falls if more than a batch is waiting, until nothing is."""
        waiting = self.jobs.qsize()
        busy = waiting > self.given.max_batch or (waiting > 0 and self.z < self.asked)
        wanted = self.asked if not busy or self.given.busy_z is None else min(self.asked, self.given.busy_z)
        if wanted != self.z:
            self.follow(wanted)
        self.sizes[len(jobs)] += 1
        found = self.logits(torch.stack([job.given for job in jobs])).softmax(-1)  # (B, classes)
        scores, classes = found.topk(min(5, found.shape[-1]))
        best = [zip(*both, strict=True) for both in zip(classes.tolist(), scores.tolist(), strict=True)]
        return [{"z": self.z, "top5": [{"class": c, "score": s} for c, s in image]} for image in best]

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Runs the model on (B, 3, H, W). Batches are not padded: what was compiled for two serves more, and full ones."""
        return self.model(images.to(self.given.device))


class Handler(BaseHTTPRequestHandler):
    """Reads a request and writes its answer, in a thread of its own."""

    server: "Server"  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = 10.0  # seconds without a byte
    unread, late = 0, False  # bytes of the body, and whether the time for them is over
    decoders = threading.BoundedSemaphore(os.cpu_count() or 1)  # so many images are decoded at a time

    def setup(self) -> None:
        super().setup()
        self.clock = threading.Timer(MOST_UPLOAD, self.stop_reading)
        self.clock.start()

    def finish(self) -> None:
        self.clock.cancel()
        super().finish()

    def stop_reading(self) -> None:
        """To the reader, the request ends here."""
        self.late = True
        with suppress(OSError):  # it has ended already
            self.connection.shutdown(socket.SHUT_RD)

    def do_GET(self) -> None:
        """/health: the ratios in force and asked for, how many images wait, how many batches of each size there were."""
        worker, known = self.server.worker, self.path == "/health"
        state = {"z": worker.z, "asked": worker.asked, "waiting": worker.jobs.qsize(), "batches": dict(worker.sizes)}
        self.reply((200 if worker.is_alive() else 503) if known else 404, state if known else {"error": "GET /health"})

    def do_POST(self) -> None:
        """/classify, with an image; /keep-ratio, with {"z": a number}."""
        try:
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or len(length) > 20:
                raise RefusedError(411, "send a Content-Length")
            self.unread = int(length)
            read = {"/classify": self.image, "/keep-ratio": self.ratio}.get(self.path)
            if read is None:
                raise RefusedError(404, "POST /classify or /keep-ratio")
            self.reply(200, self.answer(self.server.worker.ask(read(self.body()))))
        except RefusedError as error:
            self.reply(error.args[0], {"error": error.args[1]})

    def answer(self, answer: futures.Future[Any]) -> Any:
        """Waits for an answer. A job that nobody waits for any more is not done."""
        try:
            error = answer.exception(SECONDS)
        except futures.TimeoutError as late:
            answer.cancel()
            raise RefusedError(503, f"no answer within {SECONDS:g} s") from late
        if error:
            raise RefusedError(400 if isinstance(error, papr_fx.PaprError) else 500, f"{type(error).__name__}: {error}")
        return answer.result()

    def body(self) -> bytes:
        """What was sent, within `MOST_UPLOAD` seconds."""
        if self.unread > MOST_BYTES:
            raise RefusedError(413, f"the body has {self.unread} bytes; at most {MOST_BYTES} are read")
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.handle_expect_100()
        length, self.unread = self.unread, 0
        try:
            body = self.rfile.read(length)
        except TimeoutError as late:
            raise RefusedError(408, f"no byte within {self.timeout:g} s") from late
        if len(body) < length:
            status = 408 if self.late else 400
            raise RefusedError(status, f"{len(body)} of {length} bytes came; a request may take {MOST_UPLOAD:g} s")
        return body

    def image(self, body: bytes) -> Job:
        """A JPEG or PNG, prepared for the model."""
        if not body.startswith(SIGNATURES):
            raise RefusedError(400, "the body is no JPEG or PNG")
        with self.decoders:
            try:
                image = read_image(io.BytesIO(body))
            except papr_fx.ArgumentError as error:
                raise RefusedError(400, str(error)) from error
            short, long = sorted(image.size)
            if long > LONGEST * short:  # it grows when its shorter side is resized
                raise RefusedError(400, f"the image has {short} x {long} pixels: one side is over {LONGEST} times the other")
            return Job(CLASSIFY, self.server.prepare(image))

    def ratio(self, body: bytes) -> Job:
        """A keep ratio to set."""
        try:
            return Job(CHANGE, json.loads(body)["z"])
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise RefusedError(400, 'send {"z": 0.3}') from error

    def reply(self, status: int, found: object) -> None:
        """Writes an answer."""
        written = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(written)))
        self.end_headers()
        self.wfile.write(written)
        with suppress(TimeoutError):  # to close over unread bytes would take the answer along
            while self.unread > 0 and (part := self.rfile.read1(min(self.unread, 1 << 16))):
                self.unread -= len(part)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing of each request."""


class Server(ThreadingHTTPServer):
    """The worker, and what reads requests for it."""

    daemon_threads = False  # `server_close` waits for answers that are under way
    request_queue_size = 128

    def __init__(self, gm: papr_fx.PrunedModule, config: dict[str, Any], given: argparse.Namespace) -> None:
        self.prepare: Any = create_transform(**config)
        self.worker = Worker(gm, config["input_size"], given)
        self.worker.start()
        for z in reversed(self.worker.ratios):
            self.worker.ask(Job(CHANGE, z)).result()
        super().__init__((given.host, given.port), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of clients that hang up."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        """Answers what is under way, and stops the worker."""
        super().server_close()
        self.worker.jobs.put(Job(STOP))
        self.worker.join()


def main(arguments: list[str] | None = None) -> None:
    """Serves until Ctrl-C or SIGTERM."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="vit_base_patch16_224")
    options.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
    options.add_argument("--pretrained", action="store_true")
    options.add_argument("--checkpoint", default="")
    options.add_argument("--proposal", default="lite0", help="its weights are loaded")
    options.add_argument("--z", type=float, default=0.5, help="keep ratio")
    options.add_argument("--busy-z", type=float, help="keep ratio while more than a batch is waiting")
    options.add_argument("--ratios", type=float, nargs="*", default=[], help="other keep ratios that may be asked for")
    options.add_argument("--max-batch", type=int, default=32)
    options.add_argument("--deadline", type=float, default=5.0, help="ms that the first image of a batch waits for others")
    options.add_argument("--no-compile", action="store_true")
    options.add_argument("--backend", default="inductor")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=8000)
    given = options.parse_args(arguments)
    if given.max_batch < 1:
        options.error("--max-batch must be at least 1")
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    weights = {"pretrained": given.pretrained, "checkpoint_path": given.checkpoint}
    model = timm.create_model(given.model, **weights, **given.model_kwargs).eval()
    gm = papr_fx.transform(model, given.proposal, given.z).to(given.device)
    with Server(gm, resolve_data_config(given.model_kwargs, model=model), given) as server:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        print(f"http://{server.server_name}:{server.server_port}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("answers what is under way, and stops", flush=True)
        finally:
            signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
