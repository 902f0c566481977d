"""`papr-fx eval` and `papr-fx tune`: accuracy at several keep ratios in one pass, and the ratio for a target."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.utils.data import DataLoader, Subset

from . import subject as subjects
from .choose import choose_keep_ratio
from .cli_data import (
    add_data,
    add_networks,
    add_run,
    counted,
    described,
    finish,
    is_first,
    positive,
    ratios,
    row_of,
    samples,
    started,
)
from .errors import ArgumentError
from .passes.merge_tokens import Merge
from .subject import Subject


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
    add_data(command)
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
        proposal, options = _proposal(arguments, subject)
        some = [z for z in arguments.z if z < 1 or merge]
        variants = [subjects.dense(subject), *subjects.pruned(subject, proposal, some, merge=merge, **options)]
        found = counted(arguments, subject, variants)
        if not is_first():
            return
    config = {key: subject.config[key] for key in ("crop_pct", "interpolation") if key in subject.config}
    shape = {"img_size": subject.shape[-1], **config}
    rows = [{"model": arguments.model, **row_of(subject, variant, found), **shape} for variant in variants]
    shown = ["z", *(["r"] if merge else []), "top1", "top5", "top1_real", "agreement", "gmacs"]
    shown.append("videos_per_sec" if subject.views else "img_per_sec")
    table = [{key: row[key] for key in shown if key in row} for row in rows]
    kind = "videos" if subject.views else "images"
    print(f"{described(arguments, arguments.model, arguments.proposal)}: {found.total} {kind} of {arguments.data}")
    print(tabulate(table, headers="keys", floatfmt=".2f", tablefmt="github"))
    finish(arguments, rows, found.failed)


def run_tune(arguments: argparse.Namespace) -> None:
    """Runs `papr-fx tune`."""
    with started(arguments) as device:
        subject = _subject(arguments, device)
        data = samples(arguments, subject)
        proposal, options = _proposal(arguments, subject)
        size = len(data)
        places = sorted({round(i * (size - 1) / max(1, arguments.samples - 1)) for i in range(min(size, arguments.samples))})
        read = DataLoader(Subset(data, places), arguments.batch_size, num_workers=arguments.workers)
        batches = [(sample[0][keep], sample[1][keep]) for sample in read if any(keep := [not error for error in sample[3]])]
        if subject.views:  # each counts on its own
            batches = [(some.flatten(0, 1), labels.repeat_interleave(some.shape[1])) for some, labels in batches]
        loader = [some for some, _ in batches] if arguments.no_labels else batches
        targets = {key: getattr(arguments, key) for key in ("max_drop", "speedup", "gmacs")}
        z = choose_keep_ratio(subject.model, proposal, loader, **targets, example_input=subject.example, **options)
        (name,) = (key for key, value in targets.items() if value is not None)
        print(tabulate(z.curve, headers=["z", name.replace("_", " ")], floatfmt=(".4f", ".3f"), tablefmt="github"))
        print(f"{described(arguments, arguments.model, arguments.proposal)}\nz = {z:.4f}")


def _subject(arguments: argparse.Namespace, device: torch.device) -> Subject:
    if not subjects.is_image_model(arguments.model):
        given = [
            name for name in ("checkpoint", "img_size", "crop_pct", "interpolation", "num_classes") if vars(arguments)[name]
        ]
        if given:
            raise ArgumentError(f"--{given[0].replace('_', '-')} is for models of timm, and {arguments.model!r} is none")
        return subjects.clip_subject(
            arguments.model,
            device=device,
            pretrained=arguments.pretrained,
            temporal=arguments.temporal_views,
            spatial=arguments.spatial_views,
            step=arguments.frame_step,
        )
    return subjects.image_subject(
        arguments.model,
        device=device,
        pretrained=arguments.pretrained,
        checkpoint=arguments.checkpoint,
        data={name: vars(arguments)[name] for name in ("img_size", "crop_pct", "interpolation")},
        channels_last=arguments.channels_last,
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
