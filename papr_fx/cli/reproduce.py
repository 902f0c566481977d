"""`papr-fx reproduce`: the paper's tables beside what is measured here."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, cast

import torch
from tabulate import tabulate
from torch import nn

from ..errors import ArgumentError
from ..evaluation import variants
from ..evaluation.paper import TABLES, Line, Table
from ..evaluation.subject import ModelSpec, Subject, named_subject
from ..evaluation.variants import ProposalSpec, Variant
from ..passes.merge_tokens import Merge
from ..passes.reduction import Reduction
from ..peers import at_macs
from ..planning.module import PrunedModule, sibling
from ..review.report import report
from .counting import counted
from .data import kind_of
from .distributed import is_first, started
from .networks import described, views_of
from .options import add_data, add_run
from .results import finish, row_of, speed_key

_HEADERS = {
    "variant": "",
    "gmacs": "GMACs",
    "paper_gmacs": "paper",
    "narrowed_gmacs": "narrowed",
    "top1": "top-1",
    "paper_top1": "paper",
    "change": "change",
    "paper_change": "paper",
    "img_per_sec": "img/s",
    "videos_per_sec": "videos/s",
    "paper_img_per_sec": "paper",
    "speed_up": "speed-up",
    "paper_speed_up": "paper",
}


def add_reproduce(command: argparse.ArgumentParser) -> None:
    """Adds the options of `papr-fx reproduce`."""
    command.add_argument("name", choices=(*TABLES, "all"), metavar="NAME", help=f"one of {', '.join(TABLES)}, or all")
    add_data(command, optional=True)
    add_run(command)
    command.add_argument(
        "--background",
        choices=("auto", "coarse"),
        default="auto",
        help="coarse: also rows of ours at the same keep ratios, in which each cell of 2 x 2 dropped patches is one token; for "
        "models that run on tokens (default: %(default)s)",
    )
    command.set_defaults(run=run_reproduce)


def run_reproduce(arguments: argparse.Namespace) -> None:
    """Runs `papr-fx reproduce`: accuracy and speed on data, multiply-accumulates without data."""
    names = list(TABLES) if arguments.name == "all" else [arguments.name]
    if len(names) > 1 and (arguments.data or arguments.checkpoint):
        raise ArgumentError("with data or a checkpoint, give the name of one table")
    if len(names) > 1 and arguments.background != "auto":
        raise ArgumentError("--background coarse is for models that run on tokens: give the name of one table")
    if (arguments.results_file or arguments.plot) and not arguments.data:
        raise ArgumentError("--results-file and --plot need data: there are no results without")
    with started(arguments) as device:
        for name in names:
            _reproduce(arguments, name, TABLES[name], device if arguments.data else torch.device("meta"))


def _reproduce(arguments: argparse.Namespace, name: str, table: Table, device: torch.device) -> None:
    subject = _subject(arguments, table, device)
    loaded = arguments.pretrained and bool(arguments.data)
    spec = ProposalSpec(table.proposal, pretrained=loaded, checkpoint=arguments.proposal_checkpoint, shared=True)
    proposal, options = variants.proposal_of(subject, spec)
    forms = [variants.dense(subject), *_variants(subject, proposal, table.lines[1:], options)]
    if arguments.background == "coarse":
        forms += _coarse(subject, proposal, table.lines[1:], options)
    narrowed = [form.macs for form in forms]
    forms = [forms[0], *map(_with_all_rows, forms[1:])]
    rows: list[dict[str, Any]] = [
        {"model": name, "variant": _named(form), "gmacs": form.macs / 1e9, **_paper(line, table.lines[0])}
        for form, line in zip_longest(forms, table.lines)
    ]
    counts = ["gmacs", "paper_gmacs"]
    if narrowed != [form.macs for form in forms]:
        counts.append("narrowed_gmacs")
        for row, macs in zip(rows, narrowed, strict=True):
            row["narrowed_gmacs"] = macs / 1e9
    if not arguments.data:
        print(f"\n{name}, {table.where}: {table.model}, {table.proposal}")
        _print(rows, ["variant", *counts])
        return
    found = counted(arguments, subject, forms)
    if not is_first():
        return
    for row, form in zip(rows, forms, strict=True):
        row |= row_of(subject, form, found)
        row["change"] = row["top1"] - rows[0]["top1"] if "top1" in row else None
        row["speed_up"] = row[speed_key(subject)] / rows[0][speed_key(subject)]
    print(f"\n{name}, {table.where}: {described(arguments, subject, table.model, table.proposal)}")
    print(f"{found.total} {kind_of(subject)} of {arguments.data}; the paper's images per second are of an RTX A5000")
    _print(rows, [key for key in _HEADERS if key in rows[0]])
    finish(arguments, rows, found.failed)


def _print(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    cells = [[row[key] for key in keys] for row in rows]
    print(tabulate(cells, headers=[_HEADERS[key] for key in keys], floatfmt=".2f", tablefmt="github"))


def _subject(arguments: argparse.Namespace, table: Table, device: torch.device) -> Subject:
    loaded = arguments.pretrained and bool(arguments.data)  # multiply-accumulates need no weights
    if loaded and not table.pretrained and not arguments.checkpoint:
        raise ArgumentError(f"{arguments.name}: its weights come as a file; give it as --checkpoint")
    from_hub = loaded and not arguments.checkpoint
    spec = ModelSpec(
        table.pretrained if from_hub else table.model,
        device,
        pretrained=from_hub,
        checkpoint=arguments.checkpoint,
        preprocessing=table.data,
        channels_last=arguments.channels_last,
        options=table.options,
        views=views_of(arguments),
    )
    return named_subject(spec)


def _variants(subject: Subject, proposal: nn.Module | None, lines: Sequence[Line], options: Mapping[str, Any]) -> list[Variant]:
    """The variants that the lines describe. With merging, as many tokens are merged as gives the line's GMACs best."""
    found: dict[Line, Variant] = {}
    for merging in (False, True):
        own = [line for line in lines if line.merging == merging]
        merge = Merge(r=1) if merging else None
        found |= zip(own, variants.pruned(subject, proposal, [line.z for line in own], merge=merge, **options), strict=True)
    return [_merged(found[line], line) if line.merging else found[line] for line in lines]


def _coarse(subject: Subject, proposal: nn.Module | None, lines: Sequence[Line], options: Mapping[str, Any]) -> list[Variant]:
    """Variants of ours, beyond the paper: a coarse background at the keep ratios of the lines without merging."""
    ratios = list(dict.fromkeys(line.z for line in lines if not line.merging))
    return variants.pruned(subject, proposal, ratios, background="coarse", **options)


def _merged(variant: Variant, line: Line) -> Variant:
    """The variant with as many tokens merged as comes nearest to the line's GMACs, which count all rows."""
    module = cast(PrunedModule, variant.module)
    merge = cast(Reduction, at_macs(sibling(module, narrow=False), round(1e9 * line.gmacs)).plan.reduction)
    module = sibling(module, reduction=merge)
    (r,) = merge.numbers
    return Variant(module, report(module).total_macs, line.z, r)


def _with_all_rows(variant: Variant) -> Variant:
    """The variant as the paper has it: all rows of the last tokens are computed, read or not."""
    module = sibling(cast(PrunedModule, variant.module), narrow=False)
    return replace(variant, module=module, macs=report(module).total_macs)


def _named(variant: Variant) -> str:
    if variant.z == 1:
        return "dense"
    if variant.coarse:
        return f"coarse z={variant.z:g} (ours)"
    return f"PaPr z={variant.z:g}" + (f" + merging r={variant.r}" if variant.r else "")


def _paper(line: Line | None, dense: Line) -> dict[str, float | None]:
    """What the paper states of a variant: nothing, if it is not the paper's."""
    if line is None:
        return dict.fromkeys(("paper_gmacs", "paper_top1", "paper_change", "paper_img_per_sec", "paper_speed_up"))
    return {
        "paper_gmacs": line.gmacs,
        "paper_top1": line.top1,
        "paper_change": line.top1 - dense.top1,
        "paper_img_per_sec": line.img_per_sec or None,
        "paper_speed_up": line.img_per_sec / dense.img_per_sec if line.img_per_sec else None,
    }
