"""`papr-fx tune`: the keep ratio for an accuracy, a speed-up or a number of multiply-accumulates."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from tabulate import tabulate
from torch.utils.data import DataLoader, Subset

from ..choose import KeepRatio, choose_keep_ratio
from ..errors import ArgumentError
from ..evaluation.chance import Versus
from ..evaluation.subject import Subject
from .data import batch_size, kind_of, samples_of
from .distributed import process_count, started
from .networks import UNLEARNT, described, has_learnt, proposal_of, subject_of
from .options import add_data, add_networks, add_random, positive_int
from .results import print_failed


def add_tune(command: argparse.ArgumentParser) -> None:
    """Adds the options of `papr-fx tune`."""
    command.set_defaults(run=run_tune)
    add_data(command, optional=True)
    add_networks(command)
    target = command.add_mutually_exclusive_group(required=True)
    target.add_argument("--max-drop", type=float, help="largest drop in accuracy, from 0 to 1")
    target.add_argument("--speedup", type=float, help="speed-up of a batch over the dense model, eager")
    target.add_argument("--gmacs", type=float, help="GMACs per image or view, the proposal included")
    command.add_argument(
        "--samples", type=positive_int, default=1000, help="images or videos to try each ratio on (default: %(default)s)"
    )
    command.add_argument("--no-labels", action="store_true", help="count agreement with the dense model, not right answers")
    add_random(command)


def run_tune(arguments: argparse.Namespace) -> None:
    """Runs `papr-fx tune`."""
    if process_count() > 1:
        raise ArgumentError("tune runs on one process; only eval and reproduce run on several")
    if not arguments.data and arguments.gmacs is None:
        raise ArgumentError("tune needs data, except for --gmacs")
    with started(arguments) as device:
        subject = subject_of(arguments, device)
        proposal, options = proposal_of(arguments, subject)
        targets = {key: getattr(arguments, key) for key in ("max_drop", "speedup", "gmacs")}
        loader = _Subsample(arguments, subject) if arguments.data else []
        random = {"random": arguments.random and arguments.max_drop is not None}
        z = choose_keep_ratio(subject.model, proposal, loader, **targets, **random, example_input=subject.example, **options)
    (name,) = (key for key, value in targets.items() if value is not None)
    _print_curve(z, name.removeprefix("max_"), subject)
    if z.random and not has_learnt(arguments, arguments.proposal):
        print(UNLEARNT)
    print(f"{described(arguments, subject, arguments.model, arguments.proposal)}\nz = {z:.4f}")
    if isinstance(loader, _Subsample):
        if arguments.max_drop and arguments.max_drop * loader.count < 1:
            print(_too_fine(arguments.max_drop, loader.count))
        print_failed(sorted(loader.failed))


def _print_curve(z: KeepRatio, name: str, subject: Subject) -> None:
    """Prints what was measured of the dense model and at each ratio, and whether the map was better there than a random one."""
    table: list[list[Any]] = [[*point] for point in z.curve]
    headers, ratios = ["z", name], dict[str, list[str]]()
    for row, point in zip(table, z.random, strict=False):  # one for each ratio, or none at all
        versus = _of_samples(point.versus, subject)
        row += [point.value, str(versus), versus.verdict]
        ratios.setdefault(versus.said(kind_of(subject)), []).append(f"{point.z:g}")
    if z.random:
        headers += [f"{name}, random map", "map - random, points", "verdict"]
    if z.dense is not None:
        print(f"dense model: {100 * z.dense:.2f} % top-1{' of single views' if subject.views else ''}")
    print(tabulate(table, headers=headers, floatfmt=(".4f", ".3f", ".3f"), tablefmt="github"))
    for sentence, where in ratios.items():
        print(f"z={', '.join(where)}: {sentence}")


def _too_fine(drop: float, count: int) -> str:
    """Says that so few samples cannot show a drop as small as that."""
    return (
        f"note: of {count} samples one is {100 / count:.2f} points, more than the {100 * drop:g} of --max-drop: z holds for "
        "these samples, and says little of others; more of them would (--samples)"
    )


def _of_samples(versus: Versus, subject: Subject) -> Versus:
    """Views of one video tell no more than one of them in the worst case, so they count as one sample together."""
    views = subject.shape[0] if subject.views else 1
    return replace(versus, images=versus.images / views, wins=versus.wins / views, losses=versus.losses / views)


class _Subsample:
    """Samples spread evenly over the data, in batches of pixels or of (pixels, classes). Each view of a video is a sample."""

    def __init__(self, arguments: argparse.Namespace, subject: Subject) -> None:
        data = samples_of(arguments, subject)
        self.count = count = min(len(data), arguments.samples)
        indices = [place * (len(data) - 1) // max(1, count - 1) for place in range(count)]
        self.batches = DataLoader(Subset(data, indices), batch_size(arguments, subject), num_workers=arguments.workers)
        self.views = subject.views
        self.labelled = arguments.max_drop is not None and not arguments.no_labels
        self.failed: set[str] = set()

    def __iter__(self) -> Iterator[Any]:
        for pixels, labels, _, errors in self.batches:
            self.failed.update(filter(None, errors))
            keep = torch.tensor([not error for error in errors])
            if self.labelled:
                keep &= labels >= 0
            inputs, classes = pixels[keep], labels[keep]
            if not len(inputs):
                continue
            if self.views:
                inputs, classes = inputs.flatten(0, 1), classes.repeat_interleave(inputs.shape[1])
            yield (inputs, classes) if self.labelled else inputs
