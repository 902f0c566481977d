"""`papr-fx eval`: accuracy of the dense model and at several keep ratios, in one pass over the data."""

from __future__ import annotations

import argparse
from dataclasses import replace

from tabulate import tabulate

from ..evaluation import variants
from .counting import counted
from .data import kind_of
from .distributed import is_first, started
from .networks import UNLEARNT, described, has_learnt, proposal_of, subject_of
from .options import add_data, add_networks, add_random, add_run, merge_of, merging, ratios
from .results import finish, print_verdicts, row_of, speed_key


def add_eval(command: argparse.ArgumentParser) -> None:
    """Adds the options of `papr-fx eval`."""
    command.set_defaults(run=run_eval)
    add_data(command)
    add_networks(command)
    add_run(command)
    add_random(command)
    command.add_argument(
        "--z", type=ratios, default=(1.0, 0.7, 0.5), help="keep ratios, separated by commas (default: 1.0,0.7,0.5)"
    )
    command.add_argument(
        "--merge",
        type=merging,
        metavar="R",
        help="also merge R tokens per block, at every keep ratio: 8; for the same MACs 8:late (more in late blocks) or "
        "8:share (the same share in each block); or 4,4,8,8 (one number for each block)",
    )
    command.add_argument("--merge-blocks", choices=("second-half", "all"), default="second-half", help="default: %(default)s")


def run_eval(arguments: argparse.Namespace) -> None:
    """Runs `papr-fx eval`, on one process or as one of those that torchrun started."""
    with started(arguments) as device:
        subject = subject_of(arguments, device)
        merge = replace(merge_of(arguments.merge), blocks=arguments.merge_blocks) if arguments.merge else None
        evaluated = [variants.dense(subject)]
        if changed := [z for z in arguments.z if z < 1 or merge]:
            proposal, options = proposal_of(arguments, subject)
            evaluated += variants.pruned(subject, proposal, changed, merge=merge, twins=arguments.random, **options)
        found = counted(arguments, subject, evaluated)
        if not is_first():
            return
    config = {key: subject.config[key] for key in ("crop_pct", "interpolation") if key in subject.config}
    shape = {"img_size": subject.shape[-1], **config}
    rows = [{"model": arguments.model, **row_of(subject, variant, found), **shape} for variant in evaluated]
    random = ("random_top1", "random_agreement")
    shown = ["z", *(["r"] if merge else []), "top1", "top5", "top1_real", "agreement", *random, "gmacs", speed_key(subject)]
    table = [{key: row.get(key) for key in shown if any(key in other for other in rows)} for row in rows]
    networks = described(arguments, subject, arguments.model, arguments.proposal)
    print(f"{networks}: {found.total} {kind_of(subject)} of {arguments.data}")
    print(tabulate(table, headers="keys", floatfmt=".2f", tablefmt="github"))
    print_verdicts(evaluated, found, kind_of(subject))
    if arguments.random and not has_learnt(arguments, arguments.proposal):
        print(UNLEARNT)
    finish(arguments, rows, found.failed)
