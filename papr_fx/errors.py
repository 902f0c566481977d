"""The errors of papr-fx: one family, so that callers can catch `PaprError` and read why a model was refused."""

from __future__ import annotations


class PaprError(ValueError):
    """A model, proposal or argument was refused. The message says what was sought, what was found, and the fix."""


class ArgumentError(PaprError):
    """An argument is out of range or of the wrong kind."""


class ProposalError(PaprError):
    """The proposal network yields no saliency map."""


class TraceError(PaprError):
    """The model's Python code cannot be recorded as a graph.

    Attributes:
        module: Qualified name of the innermost opened module whose code failed; "" for the model itself.
    """

    def __init__(self, message: str, module: str = "") -> None:
        super().__init__(message)
        self.module = module


class NoSiteError(PaprError):
    """The traced model has no place where pruning is sound."""


class VerifyError(PaprError):
    """The rewritten model failed its proof, so it is not returned."""


class SiteError(VerifyError):
    """Some sites failed the proof: positions are not where the map scores them, or do not matter.

    Attributes:
        additions: Names of the residual additions of pixel operators that can be skipped instead; empty for tokens.
    """

    def __init__(self, message: str, additions: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.additions = additions


class VersionError(PaprError, ImportError):
    """Python, or a library that papr-fx is built on, is older than any version that it runs on."""


class HookWarning(UserWarning):
    """A hook was put on a module that was traced through: nothing calls it, so the hook will not run."""


class StatisticsWarning(UserWarning):
    """The mean and std of one network's pixels are unknown, so the proposal gets images that are normalised for the model."""


def first_line(error: BaseException) -> str:
    """The class of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
