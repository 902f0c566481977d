"""What is measured, in order of worth: what time cuts off lies at the end."""

from __future__ import annotations

from collections.abc import Sequence

from .jobs import CORRECTNESS, SPEED, TRAINING, Job, Task
from .speed import CHANNELS_LAST, CHEAPEST, DENSE, MAIN, MERGING, PLAIN, SMALLER

SECONDS = {CORRECTNESS: 300.0, SPEED: 270.0, TRAINING: 270.0}
BATCH, TINY_BATCH = 128, 2
_FEW = (DENSE, MAIN, SMALLER)


def whole() -> list[Task]:
    """All tasks."""
    return [
        timed("ViT-B", "graphs", 128, (DENSE, MAIN, SMALLER, CHEAPEST, PLAIN)),
        timed("ConvNeXt-B", "graphs", 128, (DENSE, CHANNELS_LAST, MAIN, SMALLER, CHEAPEST, PLAIN)),
        timed("Swin-B", "graphs", 128, (DENSE, MAIN, SMALLER, CHEAPEST, PLAIN)),
        *(checked(name, "float32") for name in ("ViT-B", "ConvNeXt-B", "Swin-B")),
        timed("ViT-B", "graphs", 128, (DENSE, MERGING)),
        timed("ViT-L", "graphs", 128, _FEW),
        timed("ViT-S", "graphs", 128, (*_FEW, CHEAPEST)),
        timed("VideoMAE-B", "graphs", 32, (*_FEW, CHEAPEST)),
        *(checked(name, "bfloat16") for name in ("ViT-B", "ConvNeXt-B", "Swin-B")),
        *(checked(name, "float32") for name in ("EVA-02-B", "VideoMAE-B")),
        *(timed(name, "graphs", 128, (DENSE, MERGING)) for name in ("ViT-L", "ViT-S")),
        timed("ViT-B", "graphs", 32, (*_FEW, CHEAPEST)),
        timed("ViT-B", "graphs", 1, (*_FEW, CHEAPEST)),
        trained("ViT-B", 128),
        trained("ConvNeXt-B", 64),
        timed("ViT-L@384", "graphs", 128, _FEW),
        *(checked(name, "recompilations") for name in ("ViT-B", "ConvNeXt-B")),
        timed("ConvNeXt-B", "graphs", 32, (DENSE, CHANNELS_LAST, MAIN, SMALLER)),
        timed("Swin-B", "graphs", 32, _FEW),
        timed("ConvNeXt-B", "graphs", 1, _FEW),
        timed("Swin-B", "graphs", 1, _FEW),
        *(checked(name, "bfloat16") for name in ("EVA-02-B", "VideoMAE-B")),
        timed("ViT-B", "autotune", 128, (DENSE, MAIN, SMALLER, PLAIN)),
        timed("ConvNeXt-B", "autotune", 128, (DENSE, CHANNELS_LAST, MAIN, SMALLER)),
        timed("Swin-B", "autotune", 128, _FEW),
        *(checked(name, "float16") for name in ("ViT-B", "ConvNeXt-B", "Swin-B", "EVA-02-B", "VideoMAE-B")),
        *(checked(name, "recompilations") for name in ("Swin-B", "EVA-02-B", "VideoMAE-B")),
        *(timed(name, "graphs", batch, _FEW) for name in ("ViT-L", "ViT-S") for batch in (32, 1)),
        *(timed("VideoMAE-B", "graphs", batch, _FEW) for batch in (1, 128)),
        *(timed(name, "autotune", 32, _FEW) for name in ("VideoMAE-B", "ViT-B")),
        *(timed(name, "autotune", 128, _FEW) for name in ("ViT-L", "ViT-S")),
    ]


def tiny() -> list[Task]:
    """A walk through every kind of task, with tiny models on a CPU."""
    return [
        checked("ViT-B", "float32", tiny=True),
        checked("ViT-B", "recompilations", tiny=True),
        timed("ViT-B", "graphs", TINY_BATCH, (DENSE, MAIN, MERGING), tiny=True),
        timed("ConvNeXt-B", "autotune", 1, (DENSE, CHANNELS_LAST, SMALLER, PLAIN), tiny=True),
        trained("ViT-B", TINY_BATCH, tiny=True),
    ]


def checked(subject: str, what: str, *, tiny: bool = False) -> Task:
    """The check of a model in a precision, or of its recompilations."""
    job = Job(CORRECTNESS, subject, what, tiny=tiny)
    return Task(f"{CORRECTNESS} {subject} {what}", (job,), SECONDS[CORRECTNESS])


def timed(subject: str, mode: str, batch: int, variants: Sequence[str], *, tiny: bool = False) -> Task:
    """Variants of a model, timed in turns."""
    jobs = tuple(Job(SPEED, subject, what, mode, batch, tiny) for what in variants)
    name = f"{SPEED} {subject} {mode} {batch}" + (" merging" if len(variants) == 2 and MERGING in variants else "")
    return Task(name, jobs, SECONDS[SPEED] * (1.5 if mode == "autotune" else 1))


def trained(subject: str, batch: int, *, tiny: bool = False) -> Task:
    """Steps of training, dense and pruned, timed in turns."""
    jobs = tuple(Job(TRAINING, subject, what, "compiled", batch, tiny) for what in (DENSE, MAIN))
    return Task(f"{TRAINING} {subject} {batch}", jobs, SECONDS[TRAINING])
