"""What the command line says of itself: its version, and the completion script of a shell."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ArgumentError

SHELLS = ("bash", "zsh", "tcsh")
_PATHS = ("checkpoint", "proposal_checkpoint", "class_map", "data", "data_dir")  # options that name files as text


class Version(argparse.Action):
    """Prints what is installed, as a report of a fault should say."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        installed = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "timm"))
        print(f"papr-fx {importlib.metadata.version('papr-fx')} (Python {platform.python_version()}, {installed})")
        parser.exit()


class Completion(argparse.Action):
    """Prints a script that completes commands, options, their values and names of files."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, shell: Any, *__: Any) -> None:
        print(completion_script(parser, shell))
        parser.exit()


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script of a command line.

    Args:
        parser: It.
        shell: One of `SHELLS`.

    Raises:
        ArgumentError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise ArgumentError(
            f"--print-completion needs the completion extra: pip install 'papr-fx[completion]' ({error})"
        ) from error
    for action in _actions(parser):
        if action.type is Path or action.dest in _PATHS:
            action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]: where shtab looks for it
    return shtab.complete(parser, shell)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The options and arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            commands: dict[str, argparse.ArgumentParser] = action.choices
            for command in commands.values():
                yield from _actions(command)
