"""The command line: `papr-fx COMMAND`, the same as `python -m papr_fx COMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..errors import PaprError
from .bench import add_bench
from .demo import add_demo
from .diff import add_diff
from .eval import add_eval
from .models import add_models
from .reproduce import add_reproduce
from .shell import SHELLS, Completion, Version
from .show import add_show
from .tune import add_tune

_COMMANDS = {
    "demo": (add_demo, "prune a ViT on a photograph, offline: table, picture and graph diff"),
    "show": (add_show, "draw the map and the kept patches of an image or a clip, for each stage of a hierarchical model"),
    "diff": (add_diff, "print what changes in a model's graph"),
    "bench": (add_bench, "time the dense model, its pruned forms and other token reducers in turns"),
    "eval": (add_eval, "measure accuracy, dense and at several keep ratios, in one pass over a data set"),
    "tune": (add_tune, "find the keep ratio for an accuracy, a speed-up or a number of MACs"),
    "reproduce": (add_reproduce, "measure a table of the paper, beside the paper's figures"),
    "models": (add_models, "try every architecture of a library: which are pruned, and which are refused"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 2 if the input is refused, 130 if interrupted."""
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
    except PaprError as error:
        print(f"papr-fx: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("papr-fx: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="papr-fx", description="Prunes the patches that matter least to a vision model.")
    parser.add_argument("--version", action=Version, nargs=0, help="print the versions of papr-fx and of what it runs on")
    completion = "print a script for a shell that completes commands, options and files (needs the extra completion)"
    parser.add_argument("--print-completion", action=Completion, choices=SHELLS, metavar="SHELL", help=completion)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (add_options, summary) in _COMMANDS.items():
        add_options(commands.add_parser(name, help=summary))
    return parser


if __name__ == "__main__":
    sys.exit(main())
