"""`papr-fx eval` and `papr-fx tune`: accuracy at several keep ratios in one pass, and the ratio for a target."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.utils.data import DataLoader, Subset

from ..choose import choose_keep_ratio
from ..errors import ArgumentError
from ..evaluation import subject as subjects
from ..evaluation.subject import Subject
from ..passes.merge_tokens import Merge
from .options import (
    add_data,
    add_networks,
    add_run,
    batch_size,
    counted,
    described,
    finish,
    is_first,
    positive,
    ratios,
    row_of,
    samples,
    speed_key,
    started,
    tell_failed,
    views,
)


def add_eval(command: argparse.ArgumentParser) -> None:
    """Adds the options of `papr-fx eval`."""
    add_data(command)
    add_networks(command)
    add_run(command)
    command.set_defaults(run=run_eval)
    command.add_argument("--z", type=ratios, default=(1.0, 0.7, 0.5), help="keep ratios, with commas (default: 1.0,0.7,0.5)")
    command.add_argument("--merge", type=positive, metavar="R", help="also merge R tokens in a block, at every keep ratio")
    command.add_argument("--merge-blocks", choices=("second-half", "all"), default="second-half", help="default: %(default)s")


def add_tune(command: argparse.ArgumentParser) -> None:
    """Adds the options of `papr-fx tune`."""
    add_data(command, optional=True)
    add_networks(command)
    command.set_defaults(run=run_tune)
    target = command.add_mutually_exclusive_group(required=True)
    target.add_argument("--max-drop", type=float, help="accuracy that may be lost, from 0 to 1")
    target.add_argument("--speedup", type=float, help="of a batch, eager, over the dense model")
    target.add_argument("--gmacs", type=float, help="of an image or view, the proposal included")
    command.add_argument(
        "--samples", type=positive, default=1000, help="images or videos to try ratios on (default: %(default)s)"
    )
    command.add_argument("--no-labels", action="store_true", help="count agreement with the dense model, not right answers")


def run_eval(arguments: argparse.Namespace) -> None:
    """Runs `papr-fx eval`, on one process or as one of those that torchrun started."""
    with started(arguments) as device:
        subject = _subject(arguments, device)
        merge = Merge(arguments.merge, arguments.merge_blocks) if arguments.merge else None
        variants = [subjects.dense(subject)]
        if some := [z for z in arguments.z if z < 1 or merge]:
            proposal, options = _proposal(arguments, subject)
            variants += subjects.pruned(subject, proposal, some, merge=merge, **options)
        found = counted(arguments, subject, variants)
        if not is_first():
            return
    config = {key: subject.config[key] for key in ("crop_pct", "interpolation") if key in subject.config}
    shape = {"img_size": subject.shape[-1], **config}
    rows = [{"model": arguments.model, **row_of(subject, variant, found), **shape} for variant in variants]
    shown = ["z", *(["r"] if merge else []), "top1", "top5", "top1_real", "agreement", "gmacs", speed_key(subject)]
    table = [{key: row[key] for key in shown if key in row} for row in rows]
    kind = "videos" if subject.views else "images"
    networks = described(arguments, subject, arguments.model, arguments.proposal)
    print(f"{networks}: {found.total} {kind} of {arguments.data}")
    print(tabulate(table, headers="keys", floatfmt=".2f", tablefmt="github"))
    finish(arguments, rows, found.failed)


def run_tune(arguments: argparse.Namespace) -> None:
    """Runs `papr-fx tune`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ArgumentError("tune runs on one process; eval shares its work")
    if not arguments.data and arguments.gmacs is None:
        raise ArgumentError("tune needs data, but for --gmacs")
    with started(arguments) as device:
        subject = _subject(arguments, device)
        proposal, options = _proposal(arguments, subject)
        targets = {key: getattr(arguments, key) for key in ("max_drop", "speedup", "gmacs")}
        loader = _Some(arguments, subject) if arguments.data else []
        z = choose_keep_ratio(subject.model, proposal, loader, **targets, example_input=subject.example, **options)
    (name,) = (key for key, value in targets.items() if value is not None)
    print(tabulate(z.curve, headers=["z", name.replace("_", " ")], floatfmt=(".4f", ".3f"), tablefmt="github"))
    print(f"{described(arguments, subject, arguments.model, arguments.proposal)}\nz = {z:.4f}")
    if isinstance(loader, _Some):
        tell_failed(sorted(loader.failed))


class _Some:
    """Some of the data, evenly from all of it, in batches of pixels and, if asked for, classes; each view of a clip counts."""

    def __init__(self, arguments: argparse.Namespace, subject: Subject) -> None:
        data = samples(arguments, subject)
        count = min(len(data), arguments.samples)
        places = [place * (len(data) - 1) // max(1, count - 1) for place in range(count)]
        self.batches = DataLoader(Subset(data, places), batch_size(arguments, subject), num_workers=arguments.workers)
        self.views = subject.views
        self.labelled = arguments.max_drop is not None and not arguments.no_labels
        self.failed: set[str] = set()

    def __iter__(self) -> Iterator[Any]:
        for pixels, labels, _, errors in self.batches:
            self.failed.update(filter(None, errors))
            keep = torch.tensor([not error for error in errors])
            if self.labelled:
                keep &= labels >= 0
            some, known = pixels[keep], labels[keep]
            if not len(some):
                continue
            if self.views:
                some, known = some.flatten(0, 1), known.repeat_interleave(some.shape[1])
            yield (some, known) if self.labelled else some


def _subject(arguments: argparse.Namespace, device: torch.device) -> Subject:
    return subjects.named_subject(
        arguments.model,
        device=device,
        pretrained=arguments.pretrained,
        checkpoint=arguments.checkpoint,
        data={name: vars(arguments)[name] for name in ("img_size", "crop_pct", "interpolation")},
        channels_last=arguments.channels_last,
        views=views(arguments),
        **({"num_classes": arguments.num_classes} if arguments.num_classes else {}),
    )


def _proposal(arguments: argparse.Namespace, subject: Subject) -> tuple[nn.Module, dict[str, Any]]:
    return subjects.proposal_of(
        subject,
        arguments.proposal,
        pretrained=arguments.pretrained,
        checkpoint=arguments.proposal_checkpoint,
        size=arguments.proposal_size,
        shared=arguments.shared_stats,
        saliency=arguments.saliency,
    )
