"""`papr-fx demo`: a model pruned on a photograph or a clip that scikit-image ships; table, picture and graph diff."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tabulate import tabulate

from ..evaluation.timing import median_times
from ..planning.module import set_keep_ratio
from ..review.diff import graph_diff
from ..review.report import report
from .images import PrunedImage, draw_image, prune_image
from .options import DEFAULT_MODEL, add_picture, check_picture


def add_demo(command: argparse.ArgumentParser) -> None:
    """Adds the options of `papr-fx demo`."""
    command.set_defaults(run=run_demo)
    command.add_argument("--clip", action="store_true", help="prune a video transformer on a clip instead")
    add_picture(command)


def run_demo(arguments: argparse.Namespace) -> None:
    """Runs `papr-fx demo`."""
    check_picture(arguments.out)
    if arguments.clip:
        from .clips import demo_clip

        demo_clip(arguments)
        return
    from PIL.Image import fromarray
    from skimage.data import coffee

    arguments.model = arguments.model or DEFAULT_MODEL
    pruned = prune_image(arguments, fromarray(coffee()))
    loaded = arguments.pretrained or arguments.checkpoint
    weights = "pretrained weights" if loaded else "random weights (--pretrained loads real ones)"
    print(f"photograph: an espresso, from scikit-image\nmodel: {arguments.model}, {weights}\nproposal: {arguments.proposal}\n")
    print(
        f"8 images, {torch.get_num_threads()} threads, eager, proposal included; each pruned run takes turns with a dense one"
    )
    rows = [_row(pruned, z) for z in arguments.z]
    headers = ["z", "positions", "GMACs dense", "GMACs with proposal", "ms dense", "ms pruned", "speed-up"]
    print(tabulate(rows, headers=headers, floatfmt=("g", "", ".2f", ".2f", ".0f", ".0f", ".2f"), tablefmt="github"))
    draw_image(arguments, pruned)
    print(f"\nwhat changed in the graph at z={arguments.z[-1]:g}:\n{graph_diff(pruned.model, pruned.gm)}")


def _row(pruned: PrunedImage, z: float) -> tuple[Any, ...]:
    """Positions, multiply-accumulates and times at one keep ratio."""
    set_keep_ratio(pruned.gm, z)
    batch = pruned.images.repeat(8, 1, 1, 1)
    found = report(pruned.gm)
    times = median_times({"dense": lambda: pruned.model(batch), "pruned": lambda: pruned.gm(batch)}, rounds=5)
    dense, own = times["dense"], times["pruned"]
    positions = f"{found.sites[0].dense} -> {found.sites[0].kept}"
    return z, positions, found.dense_macs / 1e9, found.total_macs / 1e9, dense, own, dense / own
