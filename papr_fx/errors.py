"""What papr-fx raises: one family, so that callers can catch `PaprError` and read why a model was refused."""

from __future__ import annotations


class PaprError(ValueError):
    """A model, proposal or argument was refused; the message says what was sought, what was found, and the fix."""


class ArgumentError(PaprError):
    """An argument is out of range or of the wrong kind."""


class ProposalError(PaprError):
    """No significance map can be had from the proposal network."""


class TraceError(PaprError):
    """The model's Python code cannot be recorded as a graph.

    Attributes:
        module: Qualified name of the innermost opened module whose code failed ("" is the model itself).
    """

    def __init__(self, message: str, module: str = "") -> None:
        super().__init__(message)
        self.module = module


class NoSiteError(PaprError):
    """The traced model has no place where pruning is sound."""


class VerifyError(PaprError):
    """The rewritten model failed its proof, so it was not returned."""


class SiteError(VerifyError):
    """Some sites failed the proof: positions are not where the map scores them, or do not matter.

    Attributes:
        additions: Names of the residual additions whose pixel operators failed and may stay dense; empty for tokens.
    """

    def __init__(self, message: str, additions: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.additions = additions


def first_line(error: BaseException) -> str:
    """The kind of an error, and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
