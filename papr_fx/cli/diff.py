"""`papr-fx diff`: what changes in a model's graph."""

from __future__ import annotations

import argparse

from ..review.diff import graph_diff
from ..transform import transform
from .networks import image_proposal, model_of
from .options import TIMM_SOURCES, add_background, add_lite0, add_weights


def add_diff(command: argparse.ArgumentParser) -> None:
    """Adds the options of `papr-fx diff`."""
    command.set_defaults(run=run_diff)
    command.add_argument("model", help=f"name of a timm model; {TIMM_SOURCES}")
    add_lite0(command)
    command.add_argument("--z", type=float, default=0.5, help="keep ratio (default: %(default)s)")
    add_background(command)
    add_weights(command)


def run_diff(arguments: argparse.Namespace) -> None:
    """Runs `papr-fx diff`."""
    model = model_of(arguments)
    proposal, statistics = image_proposal(arguments, model)
    gm = transform(model, proposal, arguments.z, input_stats=statistics, background=arguments.background)
    print(graph_diff(model, gm), end="")
