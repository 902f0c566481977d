"""papr-fx: one call that makes a pretrained vision model run only on the significant patches (PaPr, ECCV 2024)."""

import importlib.metadata

from . import requirements as requirements  # the first: it refuses versions that the others fail on

# isort: split
from . import peers, proposals, testing, video
from .choose import KeepRatio, choose_keep_ratio
from .errors import (
    ArgumentError,
    HookWarning,
    NoSiteError,
    PaprError,
    ProposalError,
    StatisticsWarning,
    TraceError,
    VerifyError,
    VersionError,
)
from .passes.merge_tokens import Merge
from .planning.module import PrunedModule, set_keep_ratio
from .queries import keep_masks, restore_grid, significance, token_map
from .review.diff import graph_diff
from .review.report import Report, report
from .transform import transform

__all__ = [
    "ArgumentError",
    "HookWarning",
    "KeepRatio",
    "Merge",
    "NoSiteError",
    "PaprError",
    "ProposalError",
    "PrunedModule",
    "Report",
    "StatisticsWarning",
    "TraceError",
    "VerifyError",
    "VersionError",
    "choose_keep_ratio",
    "graph_diff",
    "keep_masks",
    "peers",
    "proposals",
    "report",
    "restore_grid",
    "set_keep_ratio",
    "significance",
    "testing",
    "token_map",
    "transform",
    "video",
]


def __getattr__(name: str) -> str:
    """`__version__`, as it was installed: it is looked up when it is asked for, as a checkout on the path has none."""
    if name == "__version__":
        return importlib.metadata.version("papr-fx")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
